"""Asking for the SFT set's answers: what a server that misbehaves, a refusal and a kill cost, what a rerun asks, and a dry run."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.generators import Decoding
from evaluation.generators.endpoint import EndpointGenerator
from evaluation.replies import Replies
from evaluation.store import Store
from megatron_tower.config import InputError
from megatron_tower.config_sft import EndpointConfig
from tests.unit.misbehaving_server import Server
from tests.unit.sft_setting import GOOD, Setting, lone_setting, quick, rows, write  # noqa: F401  fixtures: alone, quick
from tools import build_sft

TROUBLE = ("!500", "!later 0.01", "!half", "!malformed", "!shapeless", "!hangup", "!slow", "!filtered")


def test_a_server_that_misbehaves_costs_no_answer_that_came(alone: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    """Each trouble passes at the second attempt for even questions and never for odd ones, which are noted and asked by the next run."""
    healed = False

    def answer(prompt: str, attempt: int) -> str:
        number = int(prompt.split()[1].rstrip("?"))
        trouble = TROUBLE[number // 2 % len(TROUBLE)]
        passing = trouble != "!filtered" and number % 2 == 0
        return trouble if not healed and (number % 2 or (passing and attempt == 1)) else f"answer {number}"

    write(alone.folder / "pools" / "a.jsonl", *({"prompt": f"Question {n}?"} for n in range(16)))
    with Server(answer) as server:
        alone.model("m", server, timeout=2.0, attempts=2, concurrency=16)
        told = alone.run()
        assert {row["messages"][1]["content"] for row in rows(alone.output / "train.jsonl")} == {f"answer {n}" for n in range(0, 16, 2)}
        assert told["failures"] == {
            "m": {"429": 1, "500": 1, "connection": 1, "content_filter": 1, "half body": 1, "malformed": 2, "timeout": 1}
        }
        assert told["pools"]["a"] == {"read": 16, "no answer": 8, "kept": 8}
        assert "run it again" in capsys.readouterr().out
        before, healed = server.asked.copy(), True
        told = alone.run()
        assert server.asked - before == Counter(f"Question {n}?" for n in range(1, 16, 2)) and not told["failures"]
    assert len(rows(alone.output / "train.jsonl")) == 16 and told["cost"]["answers"]["m"]["replies"] == 16


def test_a_model_that_refuses_ends_it_and_the_others_replies_stay(alone: Setting, tmp_path: Path) -> None:
    def slowly(prompt: str, attempt: int) -> str:
        return time.sleep(0.02) or "fine"

    with Server(slowly) as good, Server(lambda prompt, attempt: "!error 401 wrong key") as bad:
        with Store(tmp_path / "answers.jsonl") as store:
            models = {n: EndpointGenerator(EndpointConfig(s.url, n, attempts=2)) for n, s in (("good", good), ("bad", bad))}
            replies = Replies(models, store, Decoding(20), 1)
            chats = [[{"role": "user", "content": f"{n}"}] for n in range(3000)]
            with pytest.raises(InputError, match="401"):
                replies.ask(chats)
            kept = len(store)
            assert not any(store[key]["model"] == "bad" for key in store)
            assert len(replies.missing("good", chats, replies.decodings[0])) == 3000 - kept > 0
        assert bad.asked.total() == 1 and good.asked.total() - kept <= 2 * 16


def test_killed_midway_nothing_stored_is_asked_again(alone: Setting) -> None:
    write(alone.folder / "pools" / "a.jsonl", *({"prompt": f"Question {n}?"} for n in range(80)))

    def slowly(reply: Callable[[str], str]) -> Callable[[str, int], str]:
        return lambda prompt, attempt: time.sleep(0.03) or reply(prompt)

    with Server(slowly(lambda prompt: GOOD)) as judge, Server(slowly(lambda prompt: f"to {prompt}")) as server:
        alone.judge(judge, concurrency=4)
        alone.model("m", server, concurrency=4, output_price=1.0)
        path = alone.output / "answers.jsonl"
        run = subprocess.Popen([sys.executable, "-m", "tools.build_sft", *alone.line], env=os.environ)
        until = time.monotonic() + 90
        while not (path.is_file() and path.read_bytes().count(b"\n") >= 20) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        stored, total = path.read_bytes().count(b"\n"), server.asked.total()
        assert 20 <= stored < 80 and total - stored <= 4 + 1 and not (alone.output / "train.jsonl").exists()
        told = alone.run()
        assert server.asked.total() - total == 80 - stored and judge.asked.total() == 80
    assert told["cost"]["answers"]["m"] | {"price": 0} == {
        "replies": 80, "prompt_tokens": 800, "tokens": 400, "without a count of tokens": 0, "price": 0
    }  # fmt: skip
    assert told["cost"]["judge"]["j"]["replies"] == 80 and told["cost"]["answers"]["m"]["price"] == pytest.approx(400 / 1e6)
    assert len(rows(alone.output / "train.jsonl")) == 80


def test_a_dry_run_asks_nothing_and_counts_what_is_missing(alone: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    alone.sft["dry_run"] = True
    with Server(lambda prompt, attempt: "fine") as server:
        alone.model("m", server, output_price=1_000_000)
        build_sft.build(alone.config)
        assert server.asked.total() == 0 and not (alone.output / "train.jsonl").exists()
        told = capsys.readouterr().out
        assert "m m: at most 12 requests" in told and f"12 prompts; {12 * build_sft.ANSWER_TOKENS}.00 in all" in told
        alone.sft["dry_run"] = False
        alone.run()
        write(alone.folder / "pools" / "a.jsonl", *({"prompt": f"Question {n}?"} for n in range(15)))
        alone.sft["dry_run"] = True
        build_sft.build(alone.config)
        assert "at most 3 requests" in capsys.readouterr().out and server.asked.total() == 12
