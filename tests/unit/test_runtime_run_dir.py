"""The phase directory tells one story: one configuration, each step once, no secrets."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.runtime import progress, run_dir


def config(tmp_path: Path, *more: str) -> Config:
    return load([f"run_dir={tmp_path}/run", *more])


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run_dir.check(config(tmp_path))
    run_dir.open_phase(config(tmp_path), step=0)
    run_dir.check(config(tmp_path, "parallel=tp2", "eval.batch_size=3"))  # another layout is the same run
    run_dir.check(config(tmp_path, "phase.async_save=true", "phase.save_every=7", "phase.keep_last=9", "phase.export=hf"))
    with pytest.raises(InputError, match=r"phase\.optimizer\.lr: 2e-05 -> 0\.5, seed: 1234 -> 9"):
        run_dir.check(config(tmp_path, "phase.optimizer.lr=0.5", "seed=9"))


@pytest.mark.parametrize("text", ["phase: [", "phase: 3", "[]", ""])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    cfg = config(tmp_path)
    run_dir.open_phase(cfg, step=0)
    (cfg.phase_dir / "config.yaml").write_text(text)
    for read in (lambda: run_dir.check(cfg), lambda: run_dir.recorded(cfg.phase_dir)):
        with pytest.raises(InputError, match=rf"^{cfg.phase_dir}/config.yaml .*: bring it back$"):
            read()


def test_a_record_of_another_version_is_read_but_not_gone_on_with(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run_dir.open_phase(cfg, step=0)
    with (cfg.phase_dir / "config.yaml").open("a") as file:
        file.write("colour: red\n")
    assert run_dir.recorded(cfg.phase_dir).phase.name == "cpt"
    with pytest.raises(InputError, match=r"config\.yaml is of another version \(colour is no key"):
        run_dir.check(cfg)


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=rf"^run_dir={tmp_path}/run can't be written: {tmp_path}/run is no folder; choose another$"):
        run_dir.check(config(tmp_path))
    (tmp_path / "run").unlink()
    finished = run_dir.nearest(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: path != finished)  # as a read-only file system answers, to root too
    with pytest.raises(InputError, match=f"can't be written: {tmp_path} is read-only"):
        run_dir.check(config(tmp_path))
    (tmp_path / "run" / "cpt").mkdir(parents=True)
    run_dir.finish(tmp_path / "run" / "cpt", 3)
    finished = tmp_path / "run" / "cpt"
    run_dir.check(config(tmp_path))  # nothing is left to write


def test_run_may_move(tmp_path: Path) -> None:
    run_dir.open_phase(config(tmp_path), step=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    run_dir.check(load([f"run_dir={tmp_path}/moved"]))
    with pytest.raises(InputError, match=r"phase\.start_from"):
        run_dir.check(load([f"run_dir={tmp_path}/moved", "phase.start_from=elsewhere"]))


def test_each_step_once(tmp_path: Path) -> None:
    """A resume at step 3 takes back what was logged after it, also a line that a crash cut short."""
    cfg = config(tmp_path)
    run_dir.open_phase(cfg, step=0)
    metrics = cfg.phase_dir / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    run_dir.open_phase(cfg, step=3)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


def test_environment_of_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex()  # no word of this file, which git's diff may hold
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JWT", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    cfg = config(tmp_path)
    for step in (0, 40):
        run_dir.open_phase(cfg, step)
    starts = json.loads((cfg.phase_dir / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 40]
    assert starts[1]["slurm"] == {"SLURM_JOB_ID": "77"} and starts[1]["packages"]["torch"] and "commit" in starts[1]["git"]
    assert not any(secret in path.read_text() for path in cfg.phase_dir.iterdir() if path.is_file())


def test_finished(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run_dir.open_phase(cfg, step=0)
    assert not run_dir.is_finished(cfg.phase_dir)
    run_dir.finish(cfg.phase_dir, step=5)
    assert run_dir.is_finished(cfg.phase_dir)


HOLD = """
import sys
from pathlib import Path
from megatron_tower.runtime import run_dir
with run_dir.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "cpt"
    job = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], env=job, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        says = rf"cpt is being trained by process {other.pid} on .* since .*: wait for its end, or choose another run_dir"
        for own in ({}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}):
            with pytest.MonkeyPatch.context() as here, pytest.raises(InputError, match=says):
                for name, value in own.items():
                    here.setenv(name, value)
                with run_dir.claimed(folder):
                    pytest.fail("held twice")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # the job's next start: the node of the one before is lost
        with run_dir.claimed(folder):
            (folder / "written").touch()
        assert [path.name for path in folder.iterdir()] == ["written"]
        other.kill()
    with run_dir.claimed(folder):
        pass


def test_a_lock_that_was_just_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the process that had it: what is locked then is no longer in the directory."""
    real, gone = fcntl.lockf, []

    def lockf(file: object, how: int) -> None:
        if not gone:
            gone.append(shutil.rmtree(tmp_path / "cpt"))
        real(file, how)

    monkeypatch.setattr(run_dir.fcntl, "lockf", lockf)
    with run_dir.claimed(tmp_path / "cpt"):
        assert (tmp_path / "cpt" / ".lock").read_text()


def test_a_directory_that_was_held_for_nothing_is_gone(tmp_path: Path) -> None:
    for there in (tmp_path, tmp_path / "runs"):
        there.mkdir(exist_ok=True)
        with pytest.raises(InputError, match="no"), run_dir.claimed(tmp_path / "runs" / "mine" / "cpt"):
            raise InputError("no")
        assert not list(there.iterdir())


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_dir.fcntl, "lockf", lockf)
    with run_dir.claimed(tmp_path / "cpt"):
        (tmp_path / "cpt" / "written").touch()


@pytest.mark.parametrize(("word", "package"), [("phase.tensorboard=true", "tensorboard"), ("phase.wandb_project=x", "wandb")])
def test_missing_writer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, package: str) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    progress.check(config(tmp_path))
    with pytest.raises(InputError, match=f"pip install {package}"):
        progress.check(config(tmp_path, word))


def test_progress_writes_every_logged_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = config(tmp_path, "phase.log_every=2", "phase.tensorboard=true")
    run_dir.open_phase(cfg, step=0)
    with progress.Progress(cfg, steps=5, done=0) as told:
        for step in range(1, 6):
            told.log(step, {"loss": 1.0 / step, "tokens_per_second": 1234.0})
    lines = [json.loads(line) for line in (cfg.phase_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5] and lines[0]["loss"] == 0.5
    assert "cpt step 5/5  loss 0.2000  1,234 tokens/s" in capsys.readouterr().out
    assert list((cfg.phase_dir / "tensorboard").iterdir())
