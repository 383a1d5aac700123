"""Ranks as processes of this machine, for laptops, tests and single nodes.

Rank 0 speaks to the terminal, the others to `rank_<n>.log`; when one fails the others are stopped and the tail of its log is shown.
SIGINT, SIGTERM and SIGUSR2 are passed on, so that a signal means to all ranks what it means to one. Leaves out: several machines (`srun`).

    code = run_ranks(["megatron_tower.train", "parallel=tp2"], world_size=2, threads=1, logs=Path("runs/x/logs"))
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from megatron_tower.command import own_words
from megatron_tower.config import Config
from megatron_tower.runtime import ports, processes
from megatron_tower.runtime.distributed import place, threads_per_rank

GRACE = 5.0  # seconds that the other ranks have to end by themselves after one has failed


def is_rank(cfg: Config) -> bool:
    """Whether this process is one of the layout's ranks, not the one that starts them."""
    return cfg.parallel.world_size == 1 or place().world_size > 1 or "WORLD_SIZE" in os.environ


def relaunch_if_needed(cfg: Config, module: str, logs: Path | None = None) -> bool:
    """Run `python -m module` with this command line as `parallel.world_size` local ranks, unless this process is one already.

    `logs`: where the ranks but the first write, the phase's own if not given. Returns False when the caller shall do the work itself,
    True when the ranks have done it; ends the process with the code of the first rank that failed.
    """
    if is_rank(cfg):
        return False
    ranks = cfg.parallel.world_size
    code = run_ranks([module, *own_words()], ranks, threads_per_rank(cfg.cluster, ranks), logs or cfg.phase_dir / "logs")
    if code:
        sys.exit(code)
    return True


def run_ranks(module_argv: list[str], world_size: int, threads: int, logs: Path) -> int:
    """Start `python -m <module_argv>` `world_size` times, wait, and return 0 or the exit code of the first rank that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": ports.free(random.SystemRandom().randrange(len(ports.PORTS))),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "OMP_NUM_THREADS": threads,
    }
    ranks: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.forwarding(ranks))
        stack.callback(_kill, ranks)
        for rank in range(world_size):
            output = None if rank == 0 else stack.enter_context(_log(logs, rank).open("w"))
            own = {"RANK": rank, "LOCAL_RANK": rank}
            env = {name: str(value) for name, value in (shared | own).items()}
            ranks.append(processes.start([sys.executable, "-m", *module_argv], env, output))
        failed = _wait(ranks)
    if failed is None:
        return 0
    code = ranks[failed].returncode
    if failed and ranks[0].returncode != code:  # else rank 0 has said the same on the terminal
        log = _log(logs, failed)
        print(f"rank {failed} failed with exit code {code}; the end of {log}:", *processes.tail(log), sep="\n  ", file=sys.stderr)
    return processes.exit_code(code)


def _wait(ranks: list[subprocess.Popen]) -> int | None:
    """Wait for all ranks to end well (None) or for the first to fail, whose number is returned after the others had their grace."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((i for i, code in enumerate(codes) if code), None)
        if failed is not None:
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(0.05)
            return failed
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _kill(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank:05d}.log"
