"""The first seconds of a job: every rank is there, its node is as the cluster is described, and the ranks can sum a number together.

Ranks meet at a store that rank 0 holds at MASTER_ADDR:MASTER_PORT, in three stages. In each, every rank tells something, rank 0 judges,
and all hear the verdict:

    arrive    who is missing after `cluster.preflight_seconds`, and where that rank should be
    facts     versions, commit, clock, GPUs, disk and paths of each node, against the cluster's figures and the other nodes'
    sum       process groups are made, and an all-reduce ends within the same time

What is wrong is one NodeError on all ranks, exit code 3. The nodes at fault are written to $MEGATRON_TOWER_JOB/failed_nodes.json, so that
a restart goes without them (`runtime/job.py`). Leaves out: torchrun, whose own rendezvous it is.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_tower.command import NodeError
from megatron_tower.config import ClusterConfig
from megatron_tower.runtime import run_dir, watchdog
from megatron_tower.runtime.job import FAILED_NODES

if TYPE_CHECKING:
    from megatron_tower.runtime.distributed import Place

PACKAGES = ("torch", "megatron-core", "transformers")
PAUSE = 0.005  # seconds between two looks
SLACK = 10.0  # seconds that the verdict may come later than the time within which ranks must tell
HEARING = 5.0  # seconds for the others to hear a verdict before rank 0 and its store are gone
GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """What a rank knows of its node. `nearest`: the deepest folder that is there on the way to each path; `clock`: ahead of rank 0's."""

    node: str
    versions: dict[str, str | None]
    gpus: int
    gpu_memory_gib: float | None
    free_gib: float | None
    nearest: dict[str, str]
    clock: float = 0.0  # seconds


@dataclass(frozen=True)
class Verdict:
    """`sentence`: what is wrong, None: nothing; `failed`: node -> reason, where nodes are at fault."""

    sentence: str | None = None
    failed: dict[str, str] | None = None


def node_name() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts(paths: Sequence[Path]) -> Facts:
    """Of this node; `paths` shall be visible on all nodes, and the first is where the disk must have space."""
    gpus = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(torch.cuda.device_count())]
    nearest = {str(path): str(run_dir.nearest(path)) for path in paths}
    free = shutil.disk_usage(nearest[str(paths[0])]).free / GIB if paths else None
    versions = {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    versions["commit"] = run_dir.git("rev-parse", "--short=12", "HEAD")
    return Facts(node_name(), versions, len(gpus), min(gpus, default=None), free, nearest)


def judge(all_facts: Sequence[Facts], cluster: ClusterConfig) -> Verdict:
    """What the nodes lack, or do otherwise than the rest."""
    full = [
        (f.node, f"has {f.free_gib:.1f} GiB free where cluster.disk_gib={cluster.disk_gib}") for f in _short_of_disk(all_facts, cluster)
    ]
    complaints = [*_complaints(all_facts, cluster), *full]
    if not complaints:
        return Verdict()
    reasons: dict[str, list[str]] = {}
    for node, reason in dict.fromkeys(complaints):  # ranks of one node say the same
        reasons.setdefault(node, []).append(reason)
    failed = {node: " and ".join(reasons[node]) for node in sorted(reasons)}
    sentence = "; ".join(f"{node} {reason}" for node, reason in failed.items()) + ": mend that, or run without the node"
    shared = len(complaints) == len(full) == len(all_facts)  # one full disk, seen from everywhere, is no node's fault
    return Verdict(sentence, {} if shared else failed)


def _short_of_disk(all_facts: Sequence[Facts], cluster: ClusterConfig) -> list[Facts]:
    return [fact for fact in all_facts if fact.free_gib is not None and fact.free_gib < cluster.disk_gib]


def _complaints(all_facts: Sequence[Facts], cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    """(node, what is wrong with it), of each rank."""
    gpus = min(cluster.gpus_per_node, len(all_facts)) if cluster.device != "cpu" else 0
    usual = {name: Counter(fact.versions[name] for fact in all_facts).most_common(1)[0][0] for name in all_facts[0].versions}
    time_of_day = statistics.median_low(fact.clock for fact in all_facts)
    deepest = {path: max((fact.nearest[path] for fact in all_facts), key=len) for path in all_facts[0].nearest}
    for fact in all_facts:
        if fact.gpus < gpus:
            yield fact.node, f"shows {fact.gpus} of {gpus} GPUs"
        if fact.gpus and fact.gpu_memory_gib < cluster.gpu_memory_gib:
            yield fact.node, f"has a GPU of {fact.gpu_memory_gib:.1f} GiB where cluster.gpu_memory_gib={cluster.gpu_memory_gib}"
        for name, version in fact.versions.items():
            if version != usual[name]:
                yield fact.node, f"has {name} {version} where the others have {usual[name]}"
        off = fact.clock - time_of_day
        if abs(off) > cluster.clock_seconds:
            yield fact.node, f"has a clock {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the others'"
        for path, nearest in fact.nearest.items():
            if len(nearest) < len(deepest[path]):
                yield fact.node, f"does not see {deepest[path]}"


def alone(cluster: ClusterConfig, paths: Sequence[Path]) -> None:
    """The preflight of the only rank. Raises NodeError."""
    verdict = judge([facts(paths)], cluster)
    if verdict.sentence:
        _write(verdict.failed)
        raise NodeError(verdict.sentence)


class Meeting:
    """The ranks at rank 0's store. Raises NodeError where a rank does not find it."""

    def __init__(self, here: "Place", cluster: ClusterConfig):
        self._here, self._cluster = here, cluster
        self._patience = timedelta(seconds=cluster.preflight_seconds)
        watchdog.arm(2 * cluster.preflight_seconds + 2 * SLACK)  # longer than a stage takes: of what waits in a library for ever
        self._nodes = [name for name in os.environ.get("MEGATRON_TOWER_NODES", "").split(",") if name]
        self._address, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        run = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT')}"  # should the port be another job's
        self._store = dist.PrefixStore(run, self._host() if here.rank == 0 else self._reach())

    def join(self, paths: Sequence[Path], backend: str, timeout: timedelta) -> None:
        """The preflight, in the course of which the global process group is made; `timeout`: of its collectives from then on."""
        at = self._agree("arrive", None, lambda told: Verdict())
        own = facts(paths)
        self._agree("facts", asdict(replace(own, clock=time.time() - at)), lambda told: judge([Facts(**f) for f in told], self._cluster))
        self._agree("sum", self._sum(backend), self._judge_sum)
        dist.distributed_c10d._set_pg_timeout(timeout)
        self._store.set_timeout(timeout)
        watchdog.disarm()

    def _host(self) -> dist.Store:
        try:
            return dist.TCPStore(self._address, self._port, None, True, self._patience, wait_for_workers=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise NodeError(
                f"port {self._port} of {node_name()}, where the ranks shall meet, is taken by another program: start again"
            ) from error

    def _reach(self) -> dist.Store:
        """Rank 0's store, once it is there."""
        deadline = time.monotonic() + self._cluster.preflight_seconds
        while True:
            try:
                socket.create_connection((self._address, self._port), timeout=max(PAUSE, deadline - time.monotonic())).close()
                return dist.TCPStore(self._address, self._port, None, False, self._patience)
            except OSError as error:
                if time.monotonic() > deadline:
                    self._accuse_rank_zero()
                    raise NodeError(
                        f"rank {self._here.rank} on {node_name()} can't reach {self._who(0)} at {self._address}:{self._port} "
                        f"within {self._cluster.preflight_seconds} s ({error}): is that node up, and the network between the two?"
                    ) from error
                time.sleep(PAUSE)

    def _accuse_rank_zero(self) -> None:
        """Note its node as failed, unless rank 0 is there and says who is."""
        noted = _failed_nodes()
        if not (noted and self._nodes):
            return
        deadline = time.monotonic() + SLACK
        while not noted.exists() and time.monotonic() < deadline:
            time.sleep(PAUSE)
        if not noted.exists():
            _write({self._nodes[0]: "rank 0 can't be reached there"})

    def _agree(self, stage: str, told: object, judge: Callable[[list], Verdict]) -> float:
        """Tell rank 0 and hear its verdict: NodeError on all ranks, or when it was spoken, by rank 0's clock."""
        watchdog.alive()
        self._store.set(f"{stage}/{self._here.rank}", json.dumps(told))
        if self._here.rank == 0:
            answers, absent = self._hear(stage)
            verdict = self._missing(absent) if absent else judge(answers)
            spoken = time.time()
            self._store.set(f"{stage}/verdict", json.dumps([verdict.sentence, spoken]))
            if verdict.sentence:
                _write(verdict.failed)
                self._last_words(len(answers))
        else:
            try:
                self._store.wait([f"{stage}/verdict"], self._patience + timedelta(seconds=SLACK))
            except dist.DistError as error:
                raise NodeError(
                    f"{self._who(0)} ended, or its node failed, while rank {self._here.rank} on {node_name()} waited"
                ) from error
            sentence, spoken = json.loads(self._store.get(f"{stage}/verdict"))
            verdict = Verdict(sentence)
        if verdict.sentence:
            self._store.add("heard", 1)
            raise NodeError(verdict.sentence)
        return spoken

    def _hear(self, stage: str) -> tuple[list, list[int]]:
        """What the ranks tell, and which of them tell nothing in time."""
        deadline = time.monotonic() + self._cluster.preflight_seconds
        answers, absent = [], []
        for rank in range(self._here.world_size):
            key = f"{stage}/{rank}"
            while not (there := self._store.check([key])) and time.monotonic() < deadline:
                time.sleep(PAUSE)
            if there:
                answers.append(json.loads(self._store.get(key)))
            else:
                absent.append(rank)
        return answers, absent

    def _last_words(self, present: int) -> None:
        """Wait until the other ranks that are present have heard the verdict: the store goes with this process."""
        deadline = time.monotonic() + HEARING
        while self._store.add("heard", 0) < present - 1 and time.monotonic() < deadline:
            time.sleep(PAUSE)

    def _missing(self, ranks: list[int]) -> Verdict:
        """Where several nodes are there and all but rank 0's are missing, that one is the likelier to be cut off."""
        who = ", ".join(self._who(rank) for rank in ranks)
        sentence = f"{who} did not arrive within {self._cluster.preflight_seconds} s: look at the nodes and the logs of these ranks"
        nodes = {self._nodes[rank // self._cluster.ranks_per_node] for rank in ranks} if self._nodes else set()
        if len(nodes) > 1 and nodes == set(self._nodes[1:]):
            return Verdict(sentence, {self._nodes[0]: "reaches no other node"})
        return Verdict(sentence, {node: "its ranks did not arrive" for node in sorted(nodes)})

    def _sum(self, backend: str) -> str | None:
        """Make the process group and add up a one of each rank; what went wrong, if anything did."""
        here = self._here
        try:
            store = dist.PrefixStore("groups", self._store)
            dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=self._patience)
            one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(one, async_op=True).wait(self._patience)
            if int(one) != here.world_size:
                return f"{node_name()} got {float(one)} as the sum of {here.world_size} ones"
        except RuntimeError as error:
            return f"{node_name()}: {str(error).splitlines()[0]}"
        return None

    def _judge_sum(self, told: list[str | None]) -> Verdict:
        wrong = list(dict.fromkeys(problem for problem in told if problem))
        if not wrong:
            return Verdict()
        return Verdict(
            f"the ranks found each other but can't compute together ({'; '.join(wrong[:4])}): look at the network between these nodes, and "
            "at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME in cluster.environment"
        )

    def _who(self, rank: int) -> str:
        return f"rank {rank} on {self._nodes[rank // self._cluster.ranks_per_node]}" if self._nodes else f"rank {rank}"


def _failed_nodes() -> Path | None:
    """Where the supervisor of the job looks for failed nodes."""
    return Path(job) / FAILED_NODES if (job := os.environ.get("MEGATRON_TOWER_JOB")) else None


def _write(failed: dict[str, str] | None) -> None:
    path = _failed_nodes()
    if path and failed:
        with contextlib.suppress(FileNotFoundError):  # another rank, which can't reach rank 0 either, was at the same and done first
            run_dir.write_text(path, json.dumps(failed))
