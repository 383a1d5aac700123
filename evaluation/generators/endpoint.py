"""A model behind an OpenAI-compatible address: chats go to <url>/chat/completions, answers are yielded as they come.

    python -m evaluation.run eval.generator=endpoint eval.endpoint.url=http://host:8000/v1 eval.endpoint.model=name

What may pass is tried again, with exponential back-off and jitter or after as long as Retry-After says: 408, 409, 425, 429, 5xx, time-outs,
broken connections, half bodies, malformed JSON. After the last attempt the prompt's answer is an "error" with the reason. What can't
pass (a wrong key, an unknown model, no quota) ends it all with one InputError, before a second prompt is sent where the first meets
it. So does a run of failed prompts: what was yielded before stands, and is not asked again by whoever keeps it.
Proxies are those of the environment. Leaves out: streaming, images, tools, likelihoods, and the key, which is never written anywhere.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn

from evaluation.generators import Chat, Decoding, Generation, Likelihood, cut
from evaluation.store import digest
from megatron_tower.config import EndpointConfig, InputError

BACK_OFF = 1.0  # seconds before the second attempt, doubled before each further one
LONGEST = 60.0  # seconds of a back-off; Retry-After may ask for more
IN_A_ROW = 20  # prompts that fail with no answer between them: nobody is there
PASSING = {408, 409, 425, 429}  # of 4xx: what may be gone at the next attempt


class Passing(Exception):
    """A failure that another attempt may not meet. after: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.reason, self.after = reason, after


class Clock:
    """What time it is in seconds, and how to wait."""

    now = staticmethod(time.monotonic)
    sleep = staticmethod(asyncio.sleep)


class EndpointGenerator:
    chat = True

    def __init__(self, cfg: EndpointConfig, clock: Clock = Clock()):
        """Raises InputError for settings that can't be; asks nothing yet."""
        url = _address(cfg.url)
        if not url.startswith(("http://", "https://")) or not cfg.model:
            raise InputError(
                f"endpoint {cfg.url}, model {cfg.model}: give an address as in http://host:8000/v1, or the file that slurm/serve.sbatch "
                "writes it to once the server is ready, and the model's name"
            )
        if min(cfg.concurrency, cfg.attempts) < 1 or cfg.timeout <= 0 or min(cfg.requests_per_minute, cfg.tokens_per_minute) < 0:
            raise InputError("an endpoint's concurrency and attempts are at least 1, its timeout is above 0, its limits are not negative")
        self.cfg, self.name = cfg, cfg.model
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.identity = digest(cfg.url, cfg.model)
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()  # of single requests, by reason
        self._key = os.environ.get(cfg.key_variable, "").strip()
        self._limit = "max_tokens"  # what the server calls an answer's longest length
        self._clock = clock
        self._free = {"requests": 0.0, "tokens": 0.0}  # from when on the next request may leave, by either limit
        self._lost = 0  # prompts in a row

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]:
        """Raises InputError where asking on is no use. Closing it, or an interrupt, drops the requests on the way."""
        stream = self._answers(chats, decoding)

        async def upcoming() -> tuple[int, Generation] | None:
            return await anext(stream, None)

        with asyncio.Runner() as runner:
            while (found := runner.run(upcoming())) is not None:
                yield found

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        self._unlikely()

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]:
        self._unlikely()

    def _unlikely(self) -> NoReturn:
        raise InputError(
            f"{self.name} is an endpoint, which has no likelihoods of given texts: leave text and preference out of eval.tasks"
        )

    def written(self, prompt: str) -> str:
        """The user's turn; what the server makes of it is not known."""
        return prompt

    def summary(self) -> dict[str, Any]:
        """Counts of requests, retries, answers, empty ones among them, failed prompts, tokens, and failed requests by reason; the cost."""
        named = ("requests", "retries", "answers", "empty", "failed", "prompt_tokens", "tokens")
        cost = (self.counts["prompt_tokens"] * self.cfg.input_price + self.counts["tokens"] * self.cfg.output_price) / 1e6
        return {name: self.counts[name] for name in named} | {"failures": dict(sorted(self.failures.items())), "cost": round(cost, 6)}

    async def _answers(self, chats: Sequence[Chat], decoding: Decoding) -> AsyncIterator[tuple[int, Generation]]:
        """`concurrency` workers take chat after chat; all but the first wait until something has been heard of the server."""
        import aiohttp

        found: asyncio.Queue[tuple[int, Generation] | BaseException] = asyncio.Queue()
        heard, numbers = asyncio.Event(), iter(range(len(chats)))

        async def work(session: aiohttp.ClientSession, first: bool) -> None:
            try:
                if not first and not self.counts["answers"]:
                    await heard.wait()
                for number in numbers:
                    found.put_nowait((number, await self._answer(session, chats[number], decoding, heard)))
            except Exception as error:  # raised by whoever takes it from the queue, after what came before it
                found.put_nowait(error)

        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self.cfg.timeout)
        async with aiohttp.ClientSession(headers=key, timeout=timeout, trust_env=True) as session:
            workers = [asyncio.create_task(work(session, i == 0)) for i in range(min(self.cfg.concurrency, len(chats)))]
            try:
                for _ in chats:
                    one = await found.get()
                    if isinstance(one, BaseException):
                        raise one
                    yield one
            finally:
                for worker in workers:
                    worker.cancel()

    async def _answer(self, session: Any, chat: Chat, decoding: Decoding, heard: asyncio.Event) -> Generation:
        """Of as many attempts as there are; raises InputError where no attempt will ever succeed."""
        for attempt in range(self.cfg.attempts):
            await self._slot()
            self.counts["requests"] += 1
            try:
                answer = await self._request(session, chat, decoding)
            except Passing as failure:
                heard.set()
                self.failures[failure.reason] += 1
                problem = failure.reason
                if attempt + 1 < self.cfg.attempts:
                    self.counts["retries"] += 1
                    await self._back_off(attempt, failure.after)
                continue
            heard.set()
            if answer.finish != "error":
                self.counts.update(answers=1, empty=not answer.text.strip())
                self._lost = 0
                return answer
            self.failures[problem := answer.problem.partition(":")[0]] += 1
            return self._failed(answer.problem)
        return self._failed(f"{problem} at the last of {self.cfg.attempts} attempts")

    def _failed(self, problem: str) -> Generation:
        self.counts["failed"] += 1
        self._lost += 1
        if self._lost >= IN_A_ROW:
            self._lost = 0
            raise InputError(f"{self.url} failed {IN_A_ROW} prompts in a row, the last one for: {problem}. Run it again when it answers")
        return Generation("", "error", problem)

    async def _slot(self) -> None:
        """Until this request may leave, by both limits and what Retry-After said to any."""
        while (wait := max(self._free.values()) - self._clock.now()) > 0:
            await self._clock.sleep(wait)
        self._hold("requests", 1, self.cfg.requests_per_minute)

    def _hold(self, what: str, count: int, per_minute: float) -> None:
        """Keep the next request back for as long as so many have. How many tokens there are is only known with the answer."""
        if per_minute:
            self._free[what] = max(self._free[what], self._clock.now()) + 60 * count / per_minute

    async def _back_off(self, attempt: int, after: float) -> None:
        if after > LONGEST:
            print(f"{self.url} asks to wait {after:.0f} s", file=sys.stderr)
        self._free["requests"] = max(self._free["requests"], self._clock.now() + after)
        await self._clock.sleep(max(after, random.uniform(0.5, 1) * min(LONGEST, BACK_OFF * 2**attempt)))

    async def _request(self, session: Any, chat: Chat, decoding: Decoding) -> Generation:
        """One attempt. An answer that the server refuses to give, to this prompt alone, has finish "error"."""
        import aiohttp

        body = {"model": self.cfg.model, "messages": chat, self._limit: decoding.max_new_tokens, "temperature": decoding.temperature}
        if decoding.temperature:
            body |= {"top_p": decoding.top_p, "seed": decoding.seed}
        try:
            async with session.post(self.url, json=body, allow_redirects=False) as response:
                status, after, raw = response.status, _seconds(response.headers.get("Retry-After")), await response.read()
        except TimeoutError as error:
            raise Passing("timeout") from error
        except aiohttp.ClientPayloadError as error:
            raise Passing("half body") from error
        except aiohttp.InvalidURL as error:
            raise InputError(f"{self.url} is no address: give one as in http://host:8000/v1") from error
        except aiohttp.ClientError as error:
            raise Passing("connection") from error
        if status == 200:
            return self._read(raw, decoding)
        return self._refused(status, raw, after)

    def _read(self, raw: bytes, decoding: Decoding) -> Generation:
        try:
            found = json.loads(raw)
            choice = found["choices"][0]
            text, finish = choice["message"].get("content") or "", choice.get("finish_reason")
            said = cut(text, decoding.stop)
            usage = found.get("usage") or {}
            spent = {"prompt_tokens": int(usage.get("prompt_tokens") or 0), "tokens": int(usage.get("completion_tokens") or 0)}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Passing("malformed") from error
        self.counts.update(spent)
        self._hold("tokens", sum(spent.values()), self.cfg.tokens_per_minute)
        if finish == "content_filter":
            return Generation("", "error", "content_filter", **spent)
        return Generation(said, "length" if finish == "length" and said == text else "stop", None, **(spent if usage else {}))

    def _refused(self, status: int, raw: bytes, after: float) -> Generation:
        said, code = self._words(raw)
        if status >= 500 or (status in PASSING and code != "insufficient_quota"):
            raise Passing(str(status), after)
        if status == 400 and "max_completion_tokens" in said and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"
            raise Passing("renamed max_tokens")
        if status in (401, 403):
            held = (
                f"set {self.cfg.key_variable} to a key that it takes" if self._key else f"the variable {self.cfg.key_variable} holds no key"
            )
            raise InputError(f"{self.url} refuses access ({status}: {said}): {held}")
        if status == 404 or status < 400:
            raise InputError(f"{self.url} knows no model {self.cfg.model}, or is no such address ({status}: {said}): check url and model")
        if status in (402, 429):
            raise InputError(f"{self.url} has no quota left for this key ({status}: {said}): run it again when it has")
        return Generation("", "error", f"{status}: {said}")

    def _words(self, raw: bytes) -> tuple[str, str | None]:
        """(what the server says of its refusal, its code for it), without the key, should it be repeated."""
        said, code = raw.decode(errors="replace"), None
        try:
            error = json.loads(said)
            error = error.get("error", error)
            said, code = (str(error.get("message", said)), error.get("code")) if isinstance(error, dict) else (str(error), None)
        except (ValueError, AttributeError):
            pass  # not JSON, which is no more than words
        said = " ".join(said.split())
        return (said.replace(self._key, "***") if self._key else said)[:300], code


def _address(url: str | None) -> str:
    """What a file holds, where `url` names one: it is the same at each start of a server, whose node is not."""
    path = Path(url or "")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else url or ""


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header, which gives seconds or a date; 0 without one."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
