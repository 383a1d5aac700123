"""A rank that stands still shows its stacks and is killed; one that moves, and what it forks, is not."""

import signal
import subprocess
import sys

from megatron_tower.config import REPOSITORY

BEGIN = "import re, time, multiprocessing\nfrom megatron_tower.runtime import watchdog\nwatchdog.GRACE = 2\n"


def life(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_stacks_of_all_threads_and_then_the_end_also_while_the_interpreter_is_stuck() -> None:
    stuck = """
import threading
threading.Thread(target=lambda: threading.Event().wait(), name="beside", daemon=True).start()
def searches():
    re.match(r"(a+)+$", "a" * 60 + "b")  # without end, in C, and no other thread may run
watchdog.arm(1)
searches()
"""
    ended = life(stuck)
    assert ended.returncode == -signal.SIGALRM
    assert "Timeout (0:00:01)" in ended.stderr and "in searches" in ended.stderr and ended.stderr.count("Thread 0x") == 2


def test_signs_of_life_keep_it_alive() -> None:
    ended = life("watchdog.arm(1)\nfor _ in range(10):\n    watchdog.alive()\n    time.sleep(0.4)")
    assert ended.returncode == 0, ended.stderr


def test_off() -> None:
    armed = life("watchdog.arm(1)\nwatchdog.disarm()\nwatchdog.alive()\ntime.sleep(4)")
    never = life(
        "watchdog.arm(0)\nwatchdog.alive()\nassert signal.getitimer(signal.ITIMER_REAL)[0] == 0".replace("watch", "import signal\nwatch", 1)
    )
    assert (armed.returncode, armed.stderr, never.returncode, never.stderr) == (0, "", 0, "")


def test_a_forked_child_outlives_it() -> None:
    code = """
watchdog.arm(1)
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,))
child.start()
while child.is_alive():
    watchdog.alive()
    time.sleep(0.1)
assert child.exitcode == 0, child.exitcode
"""
    ended = life(code)
    assert ended.returncode == 0, ended.stderr
