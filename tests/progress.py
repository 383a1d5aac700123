"""A line every two minutes with what runs and since when, and one per test of over a minute: a CI that is cut off shows where."""

import threading
import time

import pytest

EVERY, SLOW = 120.0, 60.0  # seconds


class Progress:
    """Runs where the terminal is: with xdist in the controller, which hears of every worker's tests."""

    def __init__(self, terminal: pytest.TerminalReporter):
        self.terminal = terminal
        self.begun = time.monotonic()
        self.running: dict[str, float] = {}
        self.ended = threading.Event()

    def _say(self, text: str) -> None:
        self.terminal.write_line(f"\n[{(time.monotonic() - self.begun) / 60:.1f} min] {text}")

    def _watch(self) -> None:
        while not self.ended.wait(EVERY):
            now = time.monotonic()
            since = [f"{test} ({now - start:.0f} s)" for test, start in list(self.running.items())]
            self._say(f"running: {', '.join(since) or 'nothing'}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.monotonic() - self.running.pop(nodeid, time.monotonic())
        if seconds >= SLOW:
            self._say(f"{nodeid} took {seconds:.0f} s")

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self.ended.set()
