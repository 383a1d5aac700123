"""Stand-ins for Slurm's commands, and runs that are submitted to them."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tower import launch

TOOLS = {
    "sbatch": """
        echo sbatch "$@" >> calls
        if [ "$1" = --test-only ]; then cat > judged; [ ! -e judgement ] || { cat judgement >&2; exit 1; }; exit 0; fi
        echo x >> count; id=$((100 + $(wc -l < count)))
        [ ! -e "refuse_$id" ] || { echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1; }
        cp "$1" "$id.sh"; echo "Submitted batch job $id" """,
    "sinfo": "[ ! -e down ] || { echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1; }; cat nodes",
    "squeue": "cat queue",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "scancel": 'echo scancel "$@" >> calls',
    "srun": "exit 1",
}
SLURM = [
    "cluster=local_slurm",
    "cluster.ranks_per_node=4",
    "parallel.data=8",
    "phase.seq_length=256",
    "phase.global_batch_size=64",
    "phase.micro_batch_size=8",
]
GPUS = ["cluster.gpus_per_node=4", "cluster.cpus_per_rank=3"]


class Slurm:
    """A folder in which the stand-ins keep what they were asked, and find what they are to answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, script in TOOLS.items():
            tool = folder / "bin" / name
            tool.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
            tool.chmod(0o755)
        self.nodes("main*|4|16|64000|gpu:4(S:0-1)", "big|2|64|512000|gpu:h100:8,nvme:1")
        (folder / "queue").touch()
        (folder / "calls").touch()

    def nodes(self, *kinds: str) -> None:
        (self.folder / "nodes").write_text("".join(f"{kind}\n" for kind in kinds))

    def queue(self, *jobs: tuple[str, str, int, str, Path]) -> None:
        """What squeue knows: (id, state, restarts, reason, file of the output)."""
        rows = [f"{number:<20}{state:<20}{restarts:<10}{reason:<40}{out!s:<1000}\n" for number, state, restarts, reason, out in jobs]
        (self.folder / "queue").write_text("".join(rows))

    @property
    def calls(self) -> str:
        return (self.folder / "calls").read_text()

    @property
    def scripts(self) -> dict[str, str]:
        """Script of each submitted job, by the title of its step."""
        texts = [path.read_text() for path in sorted(self.folder.glob("1*.sh"))]
        return {re.search(r"--job-name='?(?:run|evaluation)/(.+?)'?\n", text)[1]: text for text in texts}


@pytest.fixture(name="slurm")
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "plan", lambda words: plan(*words))
    return made


@pytest.fixture(name="run")
def fresh_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run")


@functools.cache
def plan(*words: str, composed: Callable = launch.plan) -> tuple:
    """Composing takes its time, and the same words give the same plan: paths are relative."""
    return composed(list(words))


def submit(run: Path, *words: str, dry_run: bool = False) -> None:
    launch.submit([*SLURM, f"run_dir={run}", "data.folder=data", *words], dry_run)
