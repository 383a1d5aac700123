"""Ranks of one machine: exit codes, logs, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY
from megatron_tower.runtime import local


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE", 0.5)


def run(logs: Path, *orders: str) -> int:
    return local.run_ranks(["tests.distributed.exits", *orders], len(orders), threads=3, logs=logs)


def test_all_end_well(tmp_path: Path) -> None:
    assert run(tmp_path, "0", "says") == 0
    assert "'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'OMP_NUM_THREADS': '3'" in (tmp_path / "rank_00001.log").read_text()


@pytest.mark.parametrize(("orders", "code"), [(("waits", "3"), 3), (("2", "2"), 2), (("waits", "killed"), 137), (("5", "waits"), 5)])
def test_code_of_the_first_that_fails(tmp_path: Path, orders: tuple[str, str], code: int) -> None:
    started = time.monotonic()
    assert run(tmp_path, *orders) == code
    assert time.monotonic() - started < 30  # the one that waits was ended


def test_tail_of_the_log_is_shown_unless_rank_zero_said_it(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run(tmp_path, "waits", "3")
    assert "rank 1 failed with exit code 3" in (shown := capfd.readouterr().err) and "rank 1 ends with 3" in shown
    run(tmp_path, "2", "2")
    assert "rank 1" not in capfd.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(tmp_path: Path, sent: signal.Signals) -> None:
    code = f"""
from pathlib import Path
from megatron_tower.runtime.local import run_ranks
raise SystemExit(run_ranks(["tests.distributed.exits", "waits", "waits", {str(tmp_path)!r}], 2, 1, Path({str(tmp_path)!r})))
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    while len(ranks := _ranks(str(tmp_path))) < 2:
        time.sleep(0.05)
    launcher.send_signal(sent)
    assert launcher.wait(30) == (128 + signal.SIGTERM if sent == signal.SIGTERM else -signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_alive(rank) for rank in ranks):
        assert time.monotonic() < deadline, "a rank is still there"
        time.sleep(0.05)


def _ranks(mark: str) -> list[int]:
    """Processes started with `mark` among their words, the launcher itself apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if b"tests.distributed.exits" in words and mark.encode() in words:
            found.append(int(path.parent.name))
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return b"Z" not in Path(f"/proc/{process}/stat").read_bytes().rsplit(b")", 1)[1].split()[:1]
    except OSError:
        return False
