# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_training_convert.py: python -m tests.unit.conversion_ranks FOLDER.

FOLDER/<model> has been converted to FOLDER/<model>_converted. It is loaded at TP2 and at PP2, and from there written as a Hugging Face
folder (<model>_tp2) and as a checkpoint of training (<model>_trained_tp2).
"""

import json
import queue
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_tower.config import ClusterConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data.manifest import digest
from megatron_tower.data.sources import sha256
from megatron_tower.models.build import build_chunks
from megatron_tower.models.hf import save_hf
from megatron_tower.runtime import distributed
from megatron_tower.training import checkpoint
from megatron_tower.training.loading import load
from megatron_tower.training.state import TrainingState, sharded_model

LAYOUTS = {"tp2": ParallelConfig(name="tp2", tensor=2), "pp2": ParallelConfig(name="pp2", pipeline=2)}


def main() -> None:
    folder = Path(sys.argv[1])
    for layout, parallel in LAYOUTS.items():
        distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
        for path in sorted(folder.glob("*_converted")):
            name = path.name.removesuffix("_converted")
            found = checkpoint.find(path)
            state = TrainingState(build_chunks(found.model, parallel, PrecisionConfig(name="bf16", params="bfloat16")))
            load(found, state)
            save_hf(state.chunks, found.model, folder / f"{name}_{layout}", None)
            step = folder / f"{name}_trained_{layout}" / "checkpoints" / "step_00000007"
            step.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            filesystem_async._results_queue = queue.Queue()
            dist_checkpointing.save(sharded_model(state.chunks), str(step), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
            dist.barrier()
            if distributed.is_rank_zero():
                files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in step.iterdir()}
                told = {"step": 7, "samples": 56, "tokens": 0, "model": asdict(found.model), "files": files}
                (step / checkpoint.MANIFEST).write_text(json.dumps(told | {"sha256": digest(told)}))
                (step.parent / checkpoint.LATEST).write_text(step.name)
            dist.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
