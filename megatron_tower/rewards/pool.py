"""Scores answers in killable processes: a reward that hangs, crashes or gives NaN costs its own answer a score, and nothing else.

    with VerifierPool(processes=8, timeout=10.0) as pool:
        verdicts = pool.score([(item, answer), ...])

The clock of an answer starts when a worker has imported its reward and begins. A worker past its time is killed with what it
started, and replaced. Workers start when first needed, are kept between calls, and die with the thread that started them.
Leaves out: what a caller does with an answer that has no score (it must not be taken for 0).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import wait

START_LIMIT = 120.0  # seconds that a worker may take to start, or to import a reward: shared file systems are slow
# One thread each, and the same order of sets (sympy's simplifications depend on it) in every worker and run.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Verdict:
    """score: in [0, 1], or None with the reason in `problem`: "timeout", "nan" or "error: ..."."""

    score: float | None
    problem: str | None = None


class VerifierPool:
    """`processes` workers, each answer at most `timeout` seconds. `rewards` names the function that finds a reward by name."""

    def __init__(self, processes: int, timeout: float, rewards: str = "megatron_tower.rewards:reward") -> None:
        self.processes, self.timeout, self.rewards = processes, timeout, rewards
        self._workers: list[_Worker] = []

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker; the pool can be used again."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def score(self, answers: Sequence[tuple[dict, str]]) -> list[Verdict]:
        """The verdict on each (item, answer), in order. Raises RuntimeError when workers don't start at all."""
        verdicts: list[Verdict | None] = [None] * len(answers)
        waiting = deque(range(len(answers)))
        try:
            while waiting or any(worker.index is not None for worker in self._workers):
                self._staff(len(waiting))
                for worker in self._workers:
                    if worker.state is State.IDLE and waiting:
                        index = waiting.popleft()
                        worker.hand(index, *answers[index])
                for worker, verdict in self._news():
                    verdicts[worker.index] = verdict
                    worker.index = None
        except BaseException:
            self.close()  # what is still being scored would be taken for an answer of the next call
            raise
        return verdicts

    def _staff(self, waiting: int) -> None:
        """Drop the workers that ended, start as many as there is work for."""
        for worker in [w for w in self._workers if w.index is None and w.process.poll() is not None]:
            worker.kill()
            self._workers.remove(worker)
        free = sum(worker.index is None for worker in self._workers)
        for _ in range(min(self.processes - len(self._workers), waiting - free)):
            self._workers.append(_Worker(self.rewards))

    def _news(self) -> list[tuple["_Worker", Verdict]]:
        """Wait until a worker speaks, ends or runs out of time; the verdicts that came of it."""
        now = time.monotonic()
        patience = min((worker.deadline - now for worker in self._workers), default=0.0)
        verdicts = [(worker, worker.listen(self.timeout)) for worker in wait(self._workers, max(patience, 0.0))]
        heard = [worker for worker, _ in verdicts]
        late = [worker for worker in self._workers if worker not in heard and worker.deadline <= time.monotonic()]
        verdicts += [(worker, worker.give_up()) for worker in late]
        return [(worker, verdict) for worker, verdict in verdicts if verdict]


class State(Enum):
    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"  # has an item, imports its reward
    RUNNING = "running"


class _Worker:
    """The pool's side of one worker process; `index` is that of the answer it holds."""

    def __init__(self, rewards: str) -> None:
        command = [sys.executable, "-m", "megatron_tower.rewards.worker", rewards]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,  # a group to kill as one
        )
        self.index: int | None = None
        self._unread = b""
        self._enter(State.STARTING, START_LIMIT)

    def fileno(self) -> int:
        """What `multiprocessing.connection.wait` waits for."""
        return self.process.stdout.fileno()

    def _enter(self, state: State, limit: float) -> None:
        self.state, self.deadline = state, time.monotonic() + limit

    def hand(self, index: int, item: dict, answer: str) -> None:
        self.index = index
        self._enter(State.LOADING, START_LIMIT)
        with contextlib.suppress(BrokenPipeError):  # it has just ended: `listen` says so
            self.process.stdin.write(json.dumps({"item": item, "answer": answer}).encode() + b"\n")
            self.process.stdin.flush()

    def listen(self, timeout: float) -> Verdict | None:
        """Take in what it wrote (there is something, or it ended); its verdict if that was it."""
        said = os.read(self.fileno(), 1 << 16)
        if not said:
            return self._ended()
        *lines, self._unread = (self._unread + said).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "begun" in reply:
                self._enter(State.RUNNING, timeout)
            else:
                self._enter(State.IDLE, float("inf"))
            if "score" in reply or "problem" in reply:
                return Verdict(reply.get("score"), reply.get("problem"))
        return None

    def give_up(self) -> Verdict:
        self.kill()
        if self.state is State.STARTING:
            raise RuntimeError(f"a reward worker was not ready after {START_LIMIT:.0f} s")
        if self.state is State.LOADING:
            return Verdict(None, f"error: its reward was not imported after {START_LIMIT:.0f} s")
        return Verdict(None, "timeout")

    def _ended(self) -> Verdict | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)  # it closed its pipe a moment before it ends: let it say how
        code = self.kill()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self.state is State.STARTING:
            raise RuntimeError(f"a reward worker ended with {how} before it was ready; what it said is on stderr")
        return Verdict(None, f"error: the worker ended with {how}") if self.index is not None else None

    def kill(self) -> int:
        """End it and what it started; its exit code, negative for a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()
