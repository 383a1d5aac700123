"""Process groups, device and seeds of one rank: nccl where CUDA exists, gloo on a CPU.

A rank learns its place from RANK/WORLD_SIZE/LOCAL_RANK/MASTER_* (torchrun, `runtime/local.py`), else from Slurm's variables, else it
is alone. Leaves out: starting ranks (`runtime/local.py` on one machine, `srun` on a cluster).
"""

import os
import random
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_tower.config import ClusterConfig, InputError, ParallelConfig

TIMEOUT = timedelta(minutes=10)  # of the rendezvous and of each collective


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


def initialize(parallel: ParallelConfig, seed: int, cluster: ClusterConfig) -> None:
    """Join the ranks, lay megatron-core's parallel groups over them and seed every generator; may be called again with another layout.

    Raises InputError when the number of ranks is not the layout's, or the device asked for is not there.
    """
    here = place()
    if here.world_size != parallel.world_size:
        raise InputError(
            f"parallel={parallel.name} needs {parallel.world_size} ranks (tensor x pipeline x context x data) and {here.world_size} "
            f"are running: start {parallel.world_size} ranks or change parallel.data"
        )
    _choose_device(here, cluster)
    if not dist.is_initialized():
        _join(here)

    from megatron.core import parallel_state, tensor_parallel  # after runtime.cpu.install()

    parallel_state.destroy_model_parallel()
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


def shutdown() -> None:
    """Leave the groups; nothing when none was joined."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


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


def _join(here: Place) -> None:
    """The global process group; a rank that never arrives makes the others fail after TIMEOUT instead of waiting for ever."""
    if here.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(_slurm_master())
    dist.init_process_group(_backend(), rank=here.rank, world_size=here.world_size, timeout=TIMEOUT)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _slurm_master() -> dict[str, str]:
    """Rendezvous of a Slurm job: its first node, a port that all ranks derive from the job id."""
    names = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    return {"MASTER_ADDR": names[0], "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000)}
