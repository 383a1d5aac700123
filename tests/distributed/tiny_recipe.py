"""The whole recipe at a size of seconds, on this machine: run once for all tests of a session, whichever worker is first."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = [
    *("recipe=demo", "data.locales=[de_DE]", "data.cldr_per_locale=300", "data.sft_examples=600", "data.vocab_size=1024"),
    *("data.rl_prompts=80", "data.preference_pairs=40", "pairs.prompts=20", "pairs.samples=2", "pairs.max_new_tokens=8"),
    *("model.num_layers=2", "model.window_layers=[0]", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.kv_channels=16"),
    *("phase.seq_length=128", "phase.global_batch_size=4", "phase.micro_batch_size=2", "phase.train_steps=4"),
    *("eval.text_per_locale=4", "eval.translations_per_locale=4", "eval.general=8", "eval.preference=8", "eval.verifiable=8"),
    *("eval.bootstrap_samples=50", "eval.max_new_tokens=8", "eval.reward_timeout=120", "pairs.timeout=120"),
]


def words(folder: Path) -> list[str]:
    return [*WORDS, f"run_dir={folder / 'run'}", f"data.folder={folder / 'data'}"]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_tower.recipe", *words(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800)


def finished(temporary: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the finished recipe, and what it said."""
    shared = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "tiny_recipe"
    folder.mkdir(exist_ok=True)
    said = folder / "said.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            done = run(folder)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            said.write_text(done.stdout)
    return folder, said.read_text()
