"""Saving beside the training: the same bytes as a plain save, never half of them under a name, no failure in silence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY, Config
from megatron_tower.runtime import distributed
from megatron_tower.runtime.local import run_ranks
from megatron_tower.training import checkpoint, saving, writer
from tests.distributed import curves, saving_cases


@pytest.fixture
def trainer(folder: Path, tmp_path: Path):
    """A trainer after its first step."""
    from megatron_tower.train import build

    cfg = curves.config(folder, "gemma2", "single", f"run_dir={tmp_path}/run", "phase.async_save=true")
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    made = build(cfg, Path(cfg.phase.start_from))
    made.step()
    yield made
    distributed.shutdown()


def names(cfg: Config) -> list[str]:
    return sorted(p.name for p in (cfg.phase_dir / "checkpoints").iterdir())


def test_killed_at_20_random_moments_it_goes_on_bit_for_bit(folder: Path) -> None:
    """After every kill `latest` names a checkpoint that verifies; two steps later the tensors are those of a run that nothing befell."""
    command = [sys.executable, "-m", "tests.distributed.saving_cases", "kills", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    told = json.loads((folder / "kills.json").read_text())
    assert told["steps"] == sorted(told["steps"]) and len(set(told["steps"])) > saving_cases.KILLS // 4
    assert told["torn"] > 3  # kills that came while a checkpoint was being written
    assert told["last"] == [told["steps"][-1] + 2] * 2 and told["equal"]
    assert not any(name.endswith(".part") for name in told["left"]) and not told["orphan"]


def test_on_two_ranks_it_writes_the_same_bytes_and_a_failure_is_told_to_both(folder: Path, tmp_path: Path) -> None:
    """With and without the distributed optimizer, while two further steps change every weight."""
    assert run_ranks(["tests.distributed.saving_cases", "ranks", str(folder)], 2, threads=1, logs=tmp_path) == 0
    told = json.loads((folder / "ranks.json").read_text())
    said = told.pop("failed")
    assert len(told) == 2 and all(case["equal"] and case["files"] >= 5 and case["step"] == "step_00000001" for case in told.values()), told
    assert "step 2 could not be saved (rank 1: OSError: [Errno 28] No space left on device)" in said
    assert said.endswith("['latest', 'step_00000001']")


def test_second_save_waits_for_the_first(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = saving.begin
    monkeypatch.setattr(saving, "begin", lambda *given: seen.append(names(trainer.cfg) if seen else []) or real(*given))
    with saving.Saver(trainer.cfg) as saver:
        saver.save(trainer.state)
        trainer.step()
        saver.save(trainer.state)
    assert seen == [[], ["latest", "step_00000001"]]
    assert names(trainer.cfg) == ["latest", "step_00000001", "step_00000002"]
    checkpoint.verify(checkpoint.latest(trainer.cfg.phase_dir).path)


def test_killed_writer_is_an_error(trainer) -> None:
    with pytest.raises(RuntimeError, match=r"step 1 could not be saved \(rank 0: the writing process ended with code -9"):  # noqa: SIM117
        with saving.Saver(trainer.cfg) as saver:
            saver.save(trainer.state)
            os.kill(saver._writer._process.pid, signal.SIGKILL)
    assert names(trainer.cfg) == []


def test_full_disk_is_an_error(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes, the training or a process beside it."""
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(writer, "file_facts", lambda path: (_ for _ in ()).throw(full))
    for words in (True, False):
        trainer.cfg.phase.async_save = words
        with pytest.raises(RuntimeError, match="No space left on device"), saving.Saver(trainer.cfg) as saver:
            saver.save(trainer.state)
        assert names(trainer.cfg) == []


def test_error_in_training_gives_the_save_up(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "write", lambda buckets: signal.pause())
    with pytest.raises(FloatingPointError), saving.Saver(trainer.cfg) as saver:
        saver.save(trainer.state)
        process = saver._writer._process
        raise FloatingPointError
    assert process.exitcode == -signal.SIGKILL and checkpoint.latest(trainer.cfg.phase_dir) is None


def test_retention(tmp_path: Path) -> None:
    """The last two, and the first of each ten steps; what is later than `latest` is not counted, and not touched."""
    phase = curves.config(tmp_path, "gemma2", "single", "phase.keep_last=2", "phase.keep_every=10").phase
    left: list[int] = []
    for step in range(4, 44, 4):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / "latest").write_text(f"step_{step:08d}\n")
        for path in saving.superseded(tmp_path, phase):
            path.rmdir()
        left = [int(path.name[5:]) for path in sorted(tmp_path.glob("step_*"))]
        assert step in left
    assert left == [12, 20, 32, 36, 40]
    (tmp_path / "latest").write_text("step_00000020\n")
    phase.keep_every = 0
    assert saving.superseded(tmp_path, phase) == []


def test_a_checkpoint_is_submitted_for_its_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it but, for a while, the end of training: Slurm would end what is still submitting."""
    started, waited = [], []

    class Submission:
        def __init__(self, command: list[str], **how: object) -> None:
            started.append((command, how))

        def wait(self, seconds: float) -> None:
            waited.append(seconds)
            raise subprocess.TimeoutExpired("launch", seconds)

    monkeypatch.setattr(saving.subprocess, "Popen", Submission)
    monkeypatch.setattr(sys, "argv", ["train", "phase=cpt"])
    words = ["phase.save_every=2", "phase.keep_every=4", "phase.evaluate_every=4", "phase.evaluate_words=['eval=held_out']"]
    cfg = curves.config(tmp_path, "gemma2", "single", *words)
    cfg.phase_dir.mkdir(parents=True)
    with saving.Saver(cfg) as saver:
        for step in (0, 2, 4, 6, 8):
            saver._tell(step)
        assert not waited
    assert waited == [saving.SUBMITTING] * 2
    at = [next(word for word in command if word.startswith("eval.checkpoint=")) for command, _ in started]
    assert at == [f"eval.checkpoint={cfg.phase_dir}/checkpoints/step_0000000{step}" for step in (4, 8)]
    command, how = started[0]
    assert command[1:5] == ["-m", "megatron_tower.launch", "phase=cpt", "eval=held_out"] and how["start_new_session"]
    assert command[-1] == f"eval.output={cfg.phase_dir}/evaluation_step_00000004"
