"""Ends a rank that hangs, and shows where: without a sign of life for so long, its stacks go to stderr and SIGALRM kills it.

    watchdog.arm(seconds)     from here on
    watchdog.alive()          at each step, and in long loops that are no step
    watchdog.disarm()

The stacks, of all threads, are dumped in C, also while the interpreter is stuck in a library. All ranks of a run stand still together:
GRACE lies between the dump and the end, so that each tells where it is before the end of the first takes the others along. Child
processes are not watched. Leaves out: what becomes of the job (`runtime/job.py`).
"""

import faulthandler
import signal
import sys

GRACE = 5.0  # seconds

_seconds = 0.0  # without a sign of life; 0: nobody watches. Of the process, as the timers are


def arm(seconds: float) -> None:
    """Watch this process, from now on; 0: don't."""
    global _seconds
    disarm()
    _seconds = seconds
    if seconds:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        alive()


def alive() -> None:
    """All is well; nothing when nobody watches."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, file=sys.__stderr__)
        signal.setitimer(signal.ITIMER_REAL, _seconds + GRACE)


def disarm() -> None:
    """Watch no longer."""
    global _seconds
    if _seconds:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
    _seconds = 0.0
