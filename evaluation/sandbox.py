"""Runs programs that a model wrote, each in a place of its own (`jail.py`), and says what came of it.

    require()                                     # raises InputError where this machine has no such place: then nothing is run
    outcomes = run_all([Program(("def f(x): return x",), "def check(f): assert f(1) == 1", "f")])

There is no lesser way: without user, mount, pid and net namespaces no program is run. Nothing of this process reaches one but its text.
Leaves out: other languages than Python, and packages (programs see the standard library alone).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation import jail
from megatron_tower.config import InputError

KINDS = ("passed", "wrong", "error", "timeout", "memory", "unparsable")
SECONDS = 10  # of a process's CPU; ours. Published solutions take milliseconds
START_LIMIT = 60.0  # more for making the place and taking it down
PROCESSES = 8  # programs at once, at most
JAIL = Path(jail.__file__)


@dataclass(frozen=True)
class Program:
    """The first of the candidates that compiles, then `test`, then check(entry_point)."""

    candidates: tuple[str, ...]
    test: str
    entry_point: str


@dataclass(frozen=True)
class Outcome:
    """kind: one of KINDS; "wrong": an assertion failed, "error": anything else that isn't one of the others, ending early included."""

    kind: str
    detail: str = ""


def require() -> None:
    """Raises InputError where programs can't be kept apart from this machine."""
    try:
        outcome = run(Program(("def one(): return 1",), "def check(one): assert one() == 1", "one"))
        problem = None if outcome.kind == "passed" else f"{outcome.kind} {outcome.detail}"
    except RuntimeError as error:
        problem = str(error)
    if problem:
        raise InputError(
            f"programs that a model wrote run in user, mount, pid and net namespaces only, and this machine gives none ({problem}): allow "
            "them (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns, the container's seccomp profile) or use "
            "another machine"
        )


def run(program: Program, seconds: int = SECONDS) -> Outcome:
    """Raises RuntimeError where the place can't be made: that says nothing of the program."""
    python = os.path.realpath(sys._base_executable)  # of no virtual environment
    try:
        done = subprocess.run(
            [python, "-I", "-S", JAIL, str(seconds)],
            input=json.dumps(asdict(program)).encode(),
            capture_output=True,
            env={},
            timeout=jail.PATIENCE * seconds + START_LIMIT,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{JAIL.name} did not end") from error
    if done.returncode:
        raise RuntimeError((done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}").splitlines()[-1])
    return Outcome(**json.loads(done.stdout))


def run_all(programs: Sequence[Program]) -> list[Outcome]:
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        return list(pool.map(run, programs))
