"""Ranks that are asked to stop, hang, or do not find each other: with real files, signals and missing processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY
from megatron_tower.runtime.local import run_ranks
from tests.distributed.room import words

PATIENCE = 300  # seconds, on a busy machine


def train(folder: Path, run: Path, *more: str, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    options = ["phase=cpt", "phase.train_steps=100000", "phase.save_every=0", f"run_dir={run}"]
    command = [sys.executable, "-m", "megatron_tower.train", *words(folder, "gemma2", *options, *more)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(there: Callable[[], object], run: subprocess.Popen) -> None:
    """Wait for something while `run` is running."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def newest(run: Path) -> str | None:
    latest = run / "cpt/checkpoints/latest"
    return latest.read_text().strip() if latest.exists() else None


def last_step(run: Path) -> int:
    path = run / "cpt/metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_triggers(folder: Path, tmp_path: Path) -> None:
    """Two ranks: one checkpoint more, and on; then the last one. While `stop` is there, nothing begins."""
    triggers = tmp_path / "triggers"
    run = train(folder, tmp_path, "parallel=tp2")
    until(lambda: last_step(tmp_path), run)
    triggers.mkdir()
    (triggers / "save").touch()
    until(lambda: newest(tmp_path), run)
    first, before = newest(tmp_path), last_step(tmp_path)
    until(lambda: last_step(tmp_path) > before, run)
    assert not (triggers / "save").exists() and newest(tmp_path) == first
    (triggers / "stop").touch()
    said = run.communicate(timeout=PATIENCE)[0]
    step = last_step(tmp_path)
    assert run.returncode == 0 and f"{triggers}/stop is there (remove it to go on): saved at step {step} of" in said
    assert newest(tmp_path) == f"step_{step:08d}" > first
    saves = [json.loads(line) for line in (tmp_path / "cpt/saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves] == [int(first[5:]), step] and all(save["seconds"] > 0 for save in saves)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cpt").rglob("*") if path.is_file() and "logs" not in path.parts}
    again = train(folder, tmp_path, "parallel=tp2")
    said = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 0 and "stop is there (remove it to go on): cpt did not begin" in said
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_end_of_the_job(folder: Path, tmp_path: Path) -> None:
    """Saves of this phase are known to take a day, and the job ends in a day and a half: it saves at its first step."""
    (tmp_path / "cpt").mkdir()
    (tmp_path / "cpt/saves.jsonl").write_text('{"step": 4, "seconds": 86400.0}\n{"step": 8, "seconds": 1.0}\n')
    run = train(folder, tmp_path, MEGATRON_TOWER_END_TIME=f"{time.time() + 1.5 * 86400:.0f}")
    said = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 0 and "the job's time is nearly over: saved at step 1 of" in said
    assert newest(tmp_path) == "step_00000001" and len((tmp_path / "cpt/saves.jsonl").read_text().splitlines()) == 3


def test_stopped_rank_ends_the_run_with_the_stacks_of_the_other(folder: Path, tmp_path: Path) -> None:
    """SIGSTOP in the middle of training: rank 0 says where it waits, and all ends with the code of SIGALRM."""
    run = train(folder, tmp_path, "parallel=dp2", "cluster.hang_seconds=20")
    until(lambda: last_step(tmp_path), run)
    (rank_1,) = ranks(run.pid, "1")
    os.kill(rank_1, signal.SIGSTOP)
    said = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 128 + signal.SIGALRM, said
    assert "Timeout (0:00:20)!" in said and "training/trainer.py" in said and " in run" in said
    assert not Path(f"/proc/{rank_1}").exists() and newest(tmp_path) is None


def ranks(launcher: int, rank: str) -> list[int]:
    """Children of `launcher` that are this rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()]


def meet(case: str, world_size: int, logs: Path, capfd: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """Exit code and what each rank said."""
    code = run_ranks(["tests.distributed.stopping_cases", case], world_size, threads=1, logs=logs)
    own = "".join(capfd.readouterr())
    return code, [own, *((logs / f"rank_{rank:05d}.log").read_text() for rank in range(1, world_size))]


def test_every_rank_that_can_shows_its_stacks_before_the_first_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    code, said = meet("hang", 3, tmp_path, capfd)
    assert code == 128 + signal.SIGALRM
    assert "in all_reduce" in said[0] and "in stuck_in_c" in said[1] and all("Timeout (0:00:02)!" in s for s in said[:2])


def test_ranks_meet(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    code, said = meet("fine", 4, tmp_path, capfd)
    assert code == 0 and all(f"rank {rank} joined" in s for rank, s in enumerate(said))


def test_node_that_differs(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks say the same of n2, and the supervisor learns of it."""
    monkeypatch.setenv("MEGATRON_TOWER_JOB", f"{tmp_path}")
    code, said = meet("another", 2, tmp_path, capfd)
    assert code == 3
    for each in said:
        assert "error: n2 has transformers 0.1 where the others have" in each and "and has a clock 60 s ahead of the others': mend" in each
    assert set(json.loads((tmp_path / "failed_nodes.json").read_text())) == {"n2"}


def test_ranks_that_can_not_compute_together(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """One never comes to the all-reduce: the other's time-out names who did not."""
    code, said = meet("deaf", 2, tmp_path, capfd)
    assert code == 3 and "rank 1 on n2 did not arrive" in said[0]


@pytest.mark.parametrize(
    ("rank", "sentence", "failed"),
    [(0, "rank 1 on n2 did not arrive within 3 s", "n2"), (1, "rank 1 on n2 can't reach rank 0 on n1 at 127.0.0.1:", "n1")],
)
def test_missing_rank(tmp_path: Path, rank: int, sentence: str, failed: str) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    place = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "MEGATRON_TOWER_JOB": tmp_path,
    }
    command = [sys.executable, "-m", "tests.distributed.stopping_cases", "lonely"]
    environment = os.environ | {name: str(value) for name, value in place.items()}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 3 and f"error: {sentence}" in ended.stderr
    assert set(json.loads((tmp_path / "failed_nodes.json").read_text())) == {failed}
