"""An endpoint that misbehaves in every way it can: nothing is lost, each failure is counted, what can't pass ends it at once."""

import asyncio
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from evaluation.answers import Asker
from evaluation.generators import Decoding, Generation, endpoint
from evaluation.generators.endpoint import EndpointGenerator
from evaluation.store import Store
from megatron_tower.config import EndpointConfig, InputError
from tests.unit.misbehaving_server import Server

GREEDY = Decoding(20)
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TOWER_TEST_KEY", KEY)


class Clock:
    """Time that only waiting takes."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


def opened(server: Server, **options: object) -> EndpointGenerator:
    return EndpointGenerator(EndpointConfig(server.url, "judge", "TOWER_TEST_KEY", **{"timeout": 2.0, "attempts": 4, **options}))


def ask(generator: EndpointGenerator, prompts: list[str], decoding: Decoding = GREEDY) -> dict[str, Generation]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return {prompts[number]: found for number, found in generator.generate(chats, decoding)}


def scripted(prompt: str, attempt: int) -> str:
    """A prompt "!500 | !half | text" meets these in turn, the last one for ever."""
    words = prompt.split(" | ")
    return words[min(attempt, len(words)) - 1]


TROUBLES = {"!500": "500", "!later 0.05": "429", "!slow": "timeout", "!malformed": "malformed", "!shapeless": "malformed"}
TROUBLES |= {"!half": "half body", "!hangup": "connection", "!408": "408"}


def test_what_may_pass_is_tried_again_and_nothing_is_lost() -> None:
    prompts = [*(f"{trouble} | fine after {trouble}" for trouble in TROUBLES), *(f"plain {i}" for i in range(30))]
    with Server(scripted) as server:
        generator = opened(server)
        found = ask(generator, prompts)
    assert {prompt: one.text for prompt, one in found.items()} == {prompt: prompt.split(" | ")[-1] for prompt in prompts}
    assert {(one.finish, one.problem, one.prompt_tokens, one.tokens) for one in found.values()} == {("stop", None, 10, 5)}
    assert server.asked == {prompt: 1 + (" | " in prompt) for prompt in prompts}
    told = generator.summary()
    assert told["failures"] == {"408": 1, "429": 1, "500": 1, "connection": 1, "half body": 1, "malformed": 2, "timeout": 1}
    assert (told["requests"], told["retries"], told["answers"], told["failed"]) == (len(prompts) + 8, 8, len(prompts), 0)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_does_not_pass_is_an_error_with_its_reason_beside_the_other_answers(trouble: str) -> None:
    with Server(scripted) as server:
        generator = opened(server, attempts=2, timeout=0.3)
        found = ask(generator, [trouble, "good"])
    reason = TROUBLES[trouble]
    assert found[trouble] == Generation("", "error", f"{reason} at the last of 2 attempts")
    assert found["good"].text == "good"
    told = generator.summary()
    assert (told["failures"], told["retries"], told["failed"], told["answers"]) == ({reason: 2}, 1, 1, 1)


def test_empty_cut_and_filtered_answers_are_told_apart() -> None:
    with Server(scripted) as server:
        generator = opened(server, input_price=2.0, output_price=10.0)
        found = ask(generator, ["!empty", "!long on and on", "!filtered", "!400", "a\n\nb"], Decoding(20, stop=("\n\n",)))
    assert found["!empty"] == Generation("", "stop", None, 10, 5)
    assert found["!long on and on"] == Generation("on and on", "length", None, 10, 5)
    assert (found["!filtered"].finish, found["!filtered"].problem) == ("error", "content_filter")
    assert (found["!400"].finish, found["!400"].problem) == ("error", "400: an error, and no JSON")
    assert found["a\n\nb"].text == "a"
    told = generator.summary()
    assert (told["answers"], told["empty"], told["failed"], told["retries"]) == (3, 1, 2, 0)
    assert told["failures"] == {"400": 1, "content_filter": 1}
    assert told["cost"] == pytest.approx((4 * 10 * 2 + 4 * 5 * 10) / 1e6)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (f"!error 401 Incorrect key {KEY}", "TOWER_TEST_KEY"),
        ("!403", "refuses access"),
        ("!error 404 The model does not exist", "knows no model judge"),
        ("!redirect http://127.0.0.1:9/v1", "no such address"),
        ("!error 429 insufficient_quota", "quota"),
    ],
)
def test_what_cannot_pass_ends_it_before_the_rest_is_sent(trouble: str, words: str) -> None:
    with Server(lambda prompt, attempt: trouble) as server:
        with pytest.raises(InputError, match=words) as refused:
            ask(opened(server), [f"prompt {i}" for i in range(50)])
        time.sleep(0.05)
    assert server.asked.total() == 1
    assert KEY not in str(refused.value)


def test_answers_that_came_before_the_end_are_yielded_first() -> None:
    with Server(lambda prompt, attempt: "!401" if prompt == "7" else "yes") as server:
        got = []
        with pytest.raises(InputError, match="refuses"):
            for number, _ in opened(server, concurrency=1).generate([[{"role": "user", "content": str(i)}] for i in range(20)], GREEDY):
                got.append(number)
    assert got == list(range(7))


def test_a_server_that_has_gone_ends_it_after_so_many_prompts(tmp_path: Path) -> None:
    with Server(lambda prompt, attempt: "yes" if int(prompt) < 5 else "!500") as server, Store(tmp_path / "answers.jsonl") as store:
        with pytest.raises(InputError, match="20 prompts in a row"):
            Asker(opened(server, concurrency=2, attempts=1), store).generate([str(i) for i in range(500)], GREEDY)
        assert server.asked.total() <= 5 + 20 + 2
        assert sum(store[key]["text"] == "yes" for key in store) == 5


def test_answers_are_asked_once_and_errors_again(tmp_path: Path) -> None:
    prompts = ["!500 | !500 | now", "good"]
    with Server(scripted) as server:
        for expected in (["", "good"], ["now", "good"], ["now", "good"]):
            with Store(tmp_path / "answers.jsonl") as store:
                asker = Asker(opened(server, attempts=2), store)
                assert [one.text for one in asker.generate(prompts, GREEDY)] == expected
    assert server.asked == {prompts[0]: 3, "good": 1}


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_holds_every_request_back(date: bool) -> None:
    def answer(prompt: str, attempt: int) -> str:
        if prompt == "0" and attempt == 1:
            return f"!later {format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)}" if date else "!later 0.6"
        return "yes"

    with Server(answer) as server:
        found = ask(opened(server, concurrency=4), [str(i) for i in range(8)])
    assert len(found) == 8
    assert server.times[1] - server.times[0] > (0.9 if date else 0.55)  # a date has whole seconds


def test_back_off_doubles_and_has_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.1)
    with Server(lambda prompt, attempt: "!500" if attempt < 4 else "yes") as server:
        ask(opened(server), ["a"])
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert all(0.05 * 2**i <= wait <= 0.1 * 2**i + 0.1 for i, wait in enumerate(waits)), waits


def test_concurrency_is_kept() -> None:
    def slowly(prompt: str, attempt: int) -> str:
        time.sleep(0.05)
        return "yes"

    with Server(slowly) as server:
        ask(opened(server, concurrency=3), [str(i) for i in range(12)])
    assert server.most_at_once == 3


def left(concurrency: int, **limits: float) -> list[float]:
    """When each of six requests left; every answer has ten tokens read and five written."""
    clock, times = Clock(), []
    with Server(lambda prompt, attempt: times.append(clock.time) or "yes") as server:
        cfg = EndpointConfig(server.url, "judge", "TOWER_TEST_KEY", concurrency=concurrency, **limits)
        ask(EndpointGenerator(cfg, clock), [str(i) for i in range(6)])
    return times


def test_requests_and_tokens_per_minute_are_kept() -> None:
    assert left(1) == [0.0] * 6
    assert left(1, requests_per_minute=30) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert left(1, tokens_per_minute=300) == pytest.approx([0, 3, 6, 9, 12, 15])
    assert left(1, requests_per_minute=30, tokens_per_minute=300) == pytest.approx([0, 3, 6, 9, 12, 15])
    assert max(left(4, tokens_per_minute=300)) >= 3 * (6 - 4), "what is on the way already is not held back"


def test_an_interrupt_leaves_what_was_yielded_and_nothing_on_the_way() -> None:
    release = threading.Event()

    def answer(prompt: str, attempt: int) -> str:
        if int(prompt) >= 10:
            release.wait(10)
        return "yes"

    def interrupt() -> None:
        while len(got) < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    got: list[int] = []
    with Server(answer) as server:
        threading.Thread(target=interrupt, daemon=True).start()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                for number, _ in opened(server, concurrency=2, timeout=30).generate(
                    [[{"role": "user", "content": str(i)}] for i in range(50)], GREEDY
                ):
                    got.append(number)
        finally:
            signal.signal(signal.SIGINT, before)
            release.set()
    assert sorted(got) == list(range(10)) and server.asked.total() <= 12


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(lambda prompt, attempt: "yes") as server:
        ask(opened(server), ["greedy"])
        ask(opened(server), ["sampled"], Decoding(7, 0.5, 0.9, 3))
        monkeypatch.delenv("TOWER_TEST_KEY")
        ask(opened(server), ["no key"])
    asked = {"model": "judge", "max_tokens": 20, "temperature": 0.0}
    assert server.bodies[0] == asked | {"messages": [{"role": "user", "content": "greedy"}]}
    sampled = asked | {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert server.bodies[1] == sampled | {"messages": [{"role": "user", "content": "sampled"}]}
    assert [headers.get("Authorization") for headers in server.headers] == [f"Bearer {KEY}", f"Bearer {KEY}", None]


def test_a_server_with_another_name_for_the_length() -> None:
    message = "!error 400 Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with Server(lambda prompt, attempt: message if "max_tokens" in server.bodies[-1] else "yes") as server:
        found = ask(opened(server, concurrency=1), ["a", "b"])
    assert [one.text for one in found.values()] == ["yes", "yes"]
    assert ["max_completion_tokens" in body for body in server.bodies] == [False, True, True]


def test_settings_that_cannot_be_and_likelihoods() -> None:
    for settings in (EndpointConfig(), EndpointConfig("host:8000", "m"), EndpointConfig("http://host", "m", attempts=0)):
        with pytest.raises(InputError):
            EndpointGenerator(settings)
    generator = EndpointGenerator(EndpointConfig("http://host/v1/", "m"))
    assert (generator.name, generator.chat, generator.url, generator.written("p")) == ("m", True, "http://host/v1/chat/completions", "p")
    for measure in (lambda: generator.likelihood(["a"]), lambda: generator.answer_likelihood(["a"], ["b"])):
        with pytest.raises(InputError, match="no likelihoods"):
            measure()
    assert ask(generator, []) == {}
    assert generator.identity != EndpointGenerator(EndpointConfig("http://host/v1/", "n")).identity


def test_no_server_at_all() -> None:
    with Server(lambda prompt, attempt: "yes") as server:
        pass
    found = ask(opened(server, attempts=2), ["a"])
    assert found["a"].problem == "connection at the last of 2 attempts"


def test_an_address_may_lie_in_a_file_that_another_job_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.url"
    with pytest.raises(InputError, match=r"slurm/serve\.sbatch"):
        EndpointGenerator(EndpointConfig(str(path), "m"))
    identities = set()
    for _ in range(2):  # another node, the same model: what it said is not asked again
        with Server(scripted) as server:
            path.write_text(server.url + "\n")
            generator = EndpointGenerator(EndpointConfig(str(path), "m"))
            assert ask(generator, ["hello"])["hello"].text == "hello"
            identities.add(generator.identity)
    assert len(identities) == 1
