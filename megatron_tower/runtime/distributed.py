"""Process groups, device and seeds of one rank: nccl where CUDA exists, gloo on a CPU.

A rank learns its place from RANK/WORLD_SIZE/LOCAL_RANK/MASTER_* (torchrun, `runtime/local.py`), else from Slurm's variables, else it
is alone. Leaves out: starting ranks (`runtime/local.py` on one machine, `runtime/job.py` on a cluster), what is looked at when they
meet (`runtime/preflight.py`).
"""

import atexit
import contextlib
import gc
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tower.config import ClusterConfig, InputError, ParallelConfig
from megatron_tower.runtime import preflight, slurm

TIMEOUT = timedelta(minutes=10)  # of each collective


@dataclass(frozen=True)
class Place:
    """Where this process stands: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int
    world_size: int
    local_rank: int


def place() -> Place:
    """This process's place, from the environment; (0, 1, 0) when nothing there speaks of ranks."""
    env = os.environ
    if "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
    return Place(0, 1, 0)


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_rank_zero() -> bool:
    return place().rank == 0


def initialize(parallel: ParallelConfig, seed: int, cluster: ClusterConfig, paths: Sequence[Path] = ()) -> None:
    """Join the ranks, lay megatron-core's parallel groups over them and seed every generator; may be called again with another layout.

    Raises InputError when the number of ranks is not the layout's, or the device asked for is not there; NodeError, see `join`.
    """
    here = place()
    if here.world_size != parallel.world_size:
        raise InputError(
            f"parallel={parallel.name} needs {parallel.world_size} ranks (tensor x pipeline x context x data) and {here.world_size} "
            f"are running: start {parallel.world_size} ranks or change parallel.data"
        )
    join(cluster, paths)

    from megatron.core import parallel_state, tensor_parallel  # after runtime.cpu.install()

    _end_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def join(cluster: ClusterConfig, paths: Sequence[Path] = ()) -> None:
    """Make the global process group, after a preflight that raises NodeError; nothing when this process has joined already.

    `paths` must be visible on all nodes, and the first of them is where the disk must have space.
    """
    here = place()
    _choose_device(here, cluster)
    if dist.is_initialized():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group(_backend(), rank=here.rank, world_size=here.world_size, timeout=TIMEOUT)
    elif here.world_size == 1:
        preflight.alone(cluster, paths)
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:
        if "MASTER_ADDR" not in os.environ:
            os.environ.update(_slurm_master())
        preflight.Meeting(here, cluster).join(paths, _backend(), TIMEOUT)


def shutdown() -> None:
    """Leave the groups; nothing when none was joined.

    In a Slurm job only rank 0 goes on from here, the others wait for its end: srun --wait kills what outlives the first task to end.
    """
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    store = dist.distributed_c10d._get_default_store()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    if place().world_size > 1 and "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        if is_rank_zero():
            atexit.register(store.set, "the end", "")
        else:
            with contextlib.suppress(dist.DistError):  # rank 0 died, and its store with it
                store.wait(["the end"], timedelta(days=30))


def _end_groups() -> None:
    """End the groups of the layout before: megatron-core only forgets them, and three threads of each gloo group would poll for ever."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    gc.collect()  # the models of the layout before, which hold its groups
    dist.barrier()  # nobody still talks in one
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def broadcast(own: Any) -> Any:
    """What rank 0 holds, on every rank; every rank must call it."""
    if not dist.is_initialized() or place().world_size == 1:
        return own
    told = [own]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def gathered(own: dict) -> dict:
    """The dicts of all ranks in one; every rank must call it."""
    parts: list[dict] = [{}] * place().world_size
    dist.all_gather_object(parts, own)
    return {k: v for part in parts for k, v in part.items()}


def _choose_device(here: Place, cluster: ClusterConfig) -> None:
    cuda = torch.cuda.is_available()
    if cluster.device == "cuda" and not cuda:
        raise InputError("cluster.device=cuda, but PyTorch sees no CUDA device here: use cluster.device=auto or a machine with a GPU")
    if cluster.device == "cpu" and cuda:
        raise InputError("cluster.device=cpu on a machine with CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES= in the environment")
    if cuda:
        if here.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {here.rank} is number {here.local_rank} on its machine, which shows {torch.cuda.device_count()} GPUs: "
                "start one rank a GPU"
            )
        torch.cuda.set_device(here.local_rank)
    else:
        torch.set_num_threads(threads_per_rank(cluster, ranks_here=int(os.environ.get("LOCAL_WORLD_SIZE", here.world_size))))


def threads_per_rank(cluster: ClusterConfig, ranks_here: int) -> int:
    """CPU threads of one rank: as configured, else OMP_NUM_THREADS, else this process's cores divided among the machine's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cluster.threads_per_rank or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores // ranks_here)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _slurm_master() -> dict[str, str]:
    """Rendezvous of a Slurm job: its first node, a port that all ranks derive from the job id."""
    return {"MASTER_ADDR": slurm.nodes()[0], "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000)}
