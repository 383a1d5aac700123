"""What asks a run to stop or to save, on one rank; several agree in tests/distributed/test_stopping.py."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_tower.runtime.stop import ENDING, STOPPING, Asked, StopSignal


@pytest.fixture(autouse=True)
def one_rank(single_rank: None) -> None: ...


def test_nothing(tmp_path: Path) -> None:
    assert StopSignal(tmp_path / "triggers").agreed(1e9) == Asked()


@pytest.mark.parametrize("number", STOPPING)
def test_signal(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopSignal(tmp_path)
    os.kill(os.getpid(), number)
    assert stop.agreed() == stop.agreed() == Asked(end=number.name)


def test_only_a_second_ctrl_c_has_its_usual_effect(tmp_path: Path) -> None:
    """Slurm repeats the others before it kills, at a moment when the last save may be under way."""
    stop = StopSignal(tmp_path)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR2, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert stop.agreed().end and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_save_is_taken_once_and_stop_stays(tmp_path: Path) -> None:
    stop = StopSignal(tmp_path)
    (tmp_path / "save").touch()
    assert [stop.agreed(), stop.agreed()] == [Asked(save=True), Asked()] and not (tmp_path / "save").exists()
    (tmp_path / "stop").touch()
    assert stop.agreed().end == stop.agreed().end == f"{tmp_path}/stop is there (remove it to go on)"


def test_only_rank_zero_looks_at_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tower.runtime.stop.is_rank_zero", lambda: False)
    (tmp_path / "save").touch()
    assert StopSignal(tmp_path).agreed() == Asked() and (tmp_path / "save").exists()


def test_end_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 s before it: a save that may take until then is begun, one that may take longer is not risked."""
    monkeypatch.setenv("MEGATRON_TOWER_END_TIME", f"{time.time() + 1000:.0f}")
    stop = StopSignal(tmp_path)
    assert stop.agreed(500) == Asked()
    assert stop.agreed(1000 - ENDING / 2).end == stop.agreed(5000).end == "the job's time is nearly over"
