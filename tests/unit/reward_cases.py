"""Rewards that misbehave, for the pool's tests; a worker finds them by `tests.unit.reward_cases:reward`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def hang(item: dict, answer: str) -> float:
    """Never returns, deaf to everything but SIGKILL, in a loop that checks nothing; a child of its own hangs too."""
    import signal

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen(["sleep", item["check"]])
    while True:
        pass


def sleep(item: dict, answer: str) -> float:
    time.sleep(item["check"])
    return 1.0


def meet(item: dict, answer: str) -> float:
    """Returns once two processes are here at the same time; the number of this one."""
    folder = Path(item["check"])
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return os.getpid() / 2**22


def rubbish(item: dict, answer: str) -> float:
    """Prints what looks like the protocol, by every way to stdout, and reads stdin."""
    print('{"score": 0.125}', flush=True)
    os.write(1, b'{"score": 0.125}\n\x00\xff')
    subprocess.run(["echo", '{"score": 0.125}'], check=True)
    return 1.0 if sys.stdin.read() == "" else 0.0


def broken(item: dict, answer: str) -> float:
    raise ValueError(f"no digit in {answer!r}")


CASES: dict[str, Callable[[dict, str], float]] = {
    "length": lambda item, answer: len(answer) / 10,
    "meet": meet,
    "hang": hang,
    "sleep": sleep,
    "rubbish": rubbish,
    "broken": broken,
    "nan": lambda item, answer: float("nan"),
    "infinite": lambda item, answer: float("-inf"),
    "two": lambda item, answer: 2.0,
    "memory": lambda item, answer: len(bytearray(5 << 30)),
    "none": lambda item, answer: None,
    "exit": lambda item, answer: sys.exit(3),
    "abort": lambda item, answer: os.abort(),
}


def reward(name: str) -> Callable[[dict, str], float]:
    """`slow_import` takes longer than the tests' time-out, before the clock starts."""
    if name == "slow_import":
        time.sleep(3)
        return CASES["length"]
    return CASES[name]
