"""A data folder as an array on a real Slurm: the shards of a local run, byte for byte, also when tasks are killed and one never comes."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.curation.engine import run
from megatron_tower.curation.pipeline import Pipeline
from tests.slurm import fire

STAGES = "[filter,duplicates,select]"  # those that read text; what follows is the same code in one process (tests/unit)


def words(folder: Path, name: str) -> list[str]:
    rng = random.Random(7)
    for number in range(6):
        with (folder / f"{number}.jsonl").open("w") as file:
            for _ in range(400):
                text = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60))
                file.write(json.dumps({"text": text}) + "\n")
    source = f"{{reader:jsonl,files:['{folder}/*.jsonl'],fields:{{text:text}},licence:CC0-1.0,origin:made}}"
    curation = f"{{work:{folder}/{name},sources:{{made:{source}}},stages:{STAGES},patience:1,workers:1}}"
    return ["data=catalogues", f"+data.curation={curation}", f"run_dir={folder}/run", "cluster=local_slurm"]


def content(pipeline: Pipeline) -> dict[str, bytes]:
    """Of every shard; a traceback or what a killed task had begun would show."""
    return {
        f"{stage.name}/{path.relative_to(stage.root)}": path.read_bytes()
        for stage in pipeline.stages[:3]
        for path in sorted(stage.root.rglob("*"))
        if path.is_file()
    }


def test_an_array_makes_the_shards_of_a_local_run(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    monkeypatch.setitem(cluster.env, "PYTHONPATH", str(fire.REPOSITORY))
    local = Pipeline(load(words(tmp_path, "local")))
    for stage in local.stages[:3]:
        run(stage, 2)
    array = Pipeline(load(words(tmp_path, "array")))
    number = cluster.submit("--array=0-2", f"--output={tmp_path}/%A_%a.out", "slurm/prepare_data.sbatch", *words(tmp_path, "array"))
    cluster.until(lambda: array.filter.root.is_dir(), "the array has begun")
    ours = {pid for task in ("0", "1", "2") for pid in cluster.processes(f"{number}_{task}")}
    for pid in sorted(ours):
        if b"tools.prepare_data" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            break
    cluster.until(lambda: not any(stage.missing() for stage in array.stages[:3]), "the array is done")
    assert content(array) == content(local)
