"""Ranks that meet, and what goes wrong with one of them, for test_stopping.py: `python -m tests.distributed.stopping_cases CASE`.

Each rank is a node of its own, rank 0 on n1. A rank prints what it is told and ends with the code of entry points.
"""

import importlib.metadata
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from megatron_tower.command import NodeError, refuse
from megatron_tower.config import ClusterConfig
from megatron_tower.runtime import distributed, watchdog

PATIENCE = 10  # seconds: of ranks that start together on a busy machine


def main() -> None:
    case, rank = sys.argv[1], distributed.place().rank
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    os.environ["MEGATRON_TOWER_NODES"] = ",".join(f"n{i + 1}" for i in range(distributed.place().world_size))
    if rank == 1:
        spoil(case)
    seconds = 3 if case == "lonely" else PATIENCE
    began = time.monotonic()
    try:
        distributed.join(ClusterConfig(name="test", preflight_seconds=seconds))
    except NodeError as error:
        refuse(error, 3)
    print(f"rank {rank} joined after {time.monotonic() - began:.3f} s", flush=True)
    if case == "hang":
        hang(rank)
    distributed.shutdown()


def spoil(case: str) -> None:
    """Let this rank's node differ from the others."""
    if case == "another":
        versions, now = importlib.metadata.version, time.time
        importlib.metadata.version = lambda name: "0.1" if name == "transformers" else versions(name)
        time.time = lambda: now() + 60
    elif case == "deaf":
        dist.all_reduce = lambda *_, **__: time.sleep(600)


def hang(rank: int) -> None:
    """Rank 0 waits for the others in an all-reduce, rank 1 is stuck in C, rank 2 is stopped."""
    dist.barrier()
    watchdog.arm(2)
    if rank == 1:
        stuck_in_c()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


def stuck_in_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


if __name__ == "__main__":
    main()
