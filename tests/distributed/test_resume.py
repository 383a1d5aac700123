"""What was interrupted goes on as if it had not been: through the real command, with real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY
from megatron_tower.runtime import distributed
from megatron_tower.training import checkpoint
from tests.distributed import curves
from tests.distributed.room import grpo_words, words, wpo_words


def start(folder: Path, run: Path, *more: str) -> subprocess.Popen:
    return train(words(folder, "gemma2", f"run_dir={run}", "phase=cpt", "phase.save_every=4", *more))


def train(words: list[str]) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megatron_tower.train", *words]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def metrics(run: Path, phase: str = "cpt") -> list[dict]:
    return [json.loads(line) for line in (run / phase / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """10 steps = 4 steps, SIGKILL, resume, 6 steps: losses, and every byte of the last checkpoint's tensors (weights, moments)."""
    ten = "phase.train_steps=10"
    straight = start(folder, tmp_path / "straight", ten)
    killed = start(folder, tmp_path / "killed", ten)
    while not (tmp_path / "killed/cpt/checkpoints/latest").exists():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert (tmp_path / "killed/cpt/checkpoints/latest").read_text() == "step_00000004\n"
    resumed = start(folder, tmp_path / "killed", ten)
    assert (resumed.wait(), straight.wait()) == (0, 0)
    assert "steps 5 to 10" in resumed.stdout.read()
    told = [[(m["step"], m["loss"], m["gradient_norm"], m["lr"]) for m in metrics(tmp_path / run)] for run in ("straight", "killed")]
    assert told[0] == told[1] and [m[0] for m in told[0]] == list(range(1, 11))
    tensors = [(tmp_path / run / "cpt/checkpoints/step_00000010/__0_0.distcp").read_bytes() for run in ("straight", "killed")]
    assert tensors[0] == tensors[1]
    assert [checkpoint.latest(tmp_path / run / "cpt").tokens for run in ("straight", "killed")] == [10 * 8 * 64] * 2
    again = start(folder, tmp_path / "killed", ten)
    assert again.wait() == 0 and "is finished" in again.stdout.read()


@pytest.mark.parametrize("phase, stages", [("wpo", ["reference", "step"]), ("grpo", ["step", "rollout"])])
def test_pairs_and_rollouts_killed_anywhere_go_on_bit_for_bit(folder: Path, tmp_path: Path, phase: str, stages: list[str]) -> None:
    """6 steps, in one go or with a SIGKILL at each stage: the same statistics, and every byte of the last tensors."""
    own = {"wpo": wpo_words, "grpo": grpo_words}[phase]

    def run(name: str) -> subprocess.Popen:
        return train(own(folder, "gemma2", f"run_dir={tmp_path / name}", "phase.train_steps=6", "phase.save_every=2"))

    straight, there = run("straight"), tmp_path / "killed" / phase
    for stage in stages:
        killed = run("killed")
        while not reached(there, stage):
            assert killed.poll() is None, killed.stdout.read()
            time.sleep(0.001)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL and not (there / "checkpoints/step_00000006").exists()
    resumed = run("killed")
    assert (resumed.wait(), straight.wait()) == (0, 0), resumed.stdout.read() + straight.stdout.read()
    told = [
        [{k: v for k, v in m.items() if not k.startswith(("seconds", "tokens_per", "tflops"))} for m in metrics(tmp_path / name, phase)]
        for name in ("straight", "killed")
    ]
    assert told[0] == told[1] and [m["step"] for m in told[0]] == list(range(1, 7))
    tensors = [(tmp_path / name / phase / "checkpoints/step_00000006/__0_0.distcp").read_bytes() for name in ("straight", "killed")]
    assert tensors[0] == tensors[1]


def reached(phase_dir: Path, stage: str) -> bool:
    """Whether a run is where it is to be killed. A rollout takes half of a step and begins it: it runs soon after a step was logged."""
    if stage == "reference":
        return any(phase_dir.glob("reference/*.safetensors"))
    steps = metrics(phase_dir.parent, phase_dir.name) if (phase_dir / "metrics.jsonl").exists() else []
    if stage == "rollout" and len(steps) == 3:
        time.sleep(0.02)
        return True
    return stage == "step" and len(steps) == 1


def test_signal_saves_and_ends_well(folder: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher of two ranks: both stop after the same step, a checkpoint is there, the phase is not finished."""
    words = ["phase.train_steps=5000", "phase.save_every=0", "phase.async_save=true", "parallel=tp2"]
    run = start(folder, tmp_path, *words)
    while not (tmp_path / "cpt/metrics.jsonl").exists() or not metrics(tmp_path):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0, said
    step = metrics(tmp_path)[-1]["step"]
    assert f"SIGTERM: saved at step {step} of 5000" in said
    assert (tmp_path / "cpt/checkpoints/latest").read_text() == f"step_{step:08d}\n"
    assert not (tmp_path / "cpt/finished.json").exists() and (tmp_path / "cpt/logs/rank_00001.log").exists()


@pytest.mark.parametrize("course", ["gemma2_wpo", "gemma2_grpo", "qwen2_grpo"])
def test_pairs_and_rollouts_go_on_bit_for_bit(folder: Path, course: str) -> None:
    """Optimizer, order of samples, random numbers of the rollouts, stored reference: in this process."""
    straight = curves.curve(folder, f"{course}:single")
    second = curves.curve(folder, f"{course}:single-single")
    assert second == straight[-len(second) :] and len(second) == len(straight) // 2
    distributed.shutdown()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chats_go_on_bit_for_bit(folder: Path, precision: str) -> None:
    """The other family and phase, in this process."""
    straight = curves.curve(folder, f"qwen2:single:{precision}")
    assert curves.curve(folder, f"qwen2:single-single:{precision}") == straight[curves.HALF :]
    distributed.shutdown()
