"""Child processes that share their parent's fate: signals are passed on, they die when it does; and how one ended.

Imports no torch. Leaves out: ranks (`runtime/local.py`).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# OpenMP's threads wait for one another by spinning, which starves the one waited for when another program wants a core: beside one busy
# program, two threads then did 3.5 times the work with this limit (GNU's; 300,000 otherwise), alone 3 % less.
PATIENCE = {"GOMP_SPINCOUNT": "20000"}
TAIL = 30  # lines of a log


def start(command: list[str], env: dict[str, str] | None = None, output: IO | None = None) -> subprocess.Popen:
    """Run `command` with `env` added to the environment, in a session of its own: a Ctrl-C reaches it once, through `forwarding`."""
    return subprocess.Popen(
        command,
        env=PATIENCE | os.environ | (env or {}),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


@contextlib.contextmanager
def forwarding(children: list[subprocess.Popen]) -> Iterator[None]:
    """Pass the signals in FORWARDED on to those of `children` (which may grow) that still run; the parent itself goes on."""

    def forward(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(returned: int) -> int:
    """What a shell makes of a `returncode`: 128 + n after signal n."""
    return returned if returned >= 0 else 128 - returned


def tail(log: Path) -> list[str]:
    """The last lines of a log."""
    return log.read_text(errors="replace").splitlines()[-TAIL:]


def die_with_parent() -> None:
    """In the child: be killed when the parent is (Linux), so that nothing is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
