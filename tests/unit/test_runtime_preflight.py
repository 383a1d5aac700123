"""What nodes are blamed for, in one sentence; ranks that meet are in tests/distributed/test_stopping.py."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tower.config import ClusterConfig
from megatron_tower.runtime import preflight, watchdog
from megatron_tower.runtime.distributed import Place
from megatron_tower.runtime.preflight import Facts, NodeError, judge

CLUSTER = ClusterConfig(name="test", ranks_per_node=2, gpus_per_node=2, gpu_memory_gib=79.0, disk_gib=100.0, preflight_seconds=1)
GOOD = Facts("n1", {"torch": "2.6.0", "commit": "abc"}, 2, 79.1, 500.0, {"/shared/runs": "/shared/runs"})


def nodes(*third: dict) -> list[Facts]:
    """Two ranks on each of three nodes; what `third` says is of n3's ranks."""
    return [replace(GOOD, node=f"n{i}", **(third[0] if third and i == 3 else {})) for i in (1, 1, 2, 2, 3, 3)]


def test_all_well() -> None:
    assert judge(nodes(), CLUSTER).sentence is None
    assert judge(nodes({"clock": 9.0}), CLUSTER).sentence is None


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"gpus": 1}, "shows 1 of 2 GPUs"),
        ({"gpu_memory_gib": 40.0}, "has a GPU of 40.0 GiB where cluster.gpu_memory_gib=79.0"),
        ({"free_gib": 3.0}, "has 3.0 GiB free where cluster.disk_gib=100.0"),
        ({"versions": {"torch": "2.5.0", "commit": "abc"}}, "has torch 2.5.0 where the others have 2.6.0"),
        ({"versions": {"torch": "2.6.0", "commit": None}}, "has commit None where the others have abc"),
        ({"clock": 60.0}, "has a clock 60 s ahead of the others'"),
        ({"clock": -60.0}, "has a clock 60 s behind the others'"),
        ({"nearest": {"/shared/runs": "/"}}, "does not see /shared/runs"),
    ],
)
def test_one_node_is_named_once_with_the_reason(own: dict, reason: str) -> None:
    verdict = judge(nodes(own), CLUSTER)
    assert verdict.sentence == f"n3 {reason}: mend that, or run without the node"
    assert verdict.failed == {"n3": reason}


def test_several_contradictions_are_one_sentence() -> None:
    found = nodes({"gpus": 0, "gpu_memory_gib": None, "clock": 60.0})
    found[0] = replace(found[0], free_gib=1.0)
    said = judge(found, CLUSTER).sentence
    assert said.startswith("n1 has 1.0 GiB free where cluster.disk_gib=100.0; n3 shows 0 of 2 GPUs and has a clock 60 s ahead")


def test_rank_zero_can_be_the_odd_one_out() -> None:
    for others, own in (({"clock": 30.0}, {"clock": 0.0}), ({}, {"nearest": {"/shared/runs": "/shared"}})):
        found = [replace(fact, **others) for fact in nodes()]
        found[:2] = [replace(GOOD, **own)] * 2
        assert set(judge(found, CLUSTER).failed) == {"n1"}


def test_a_shared_disk_that_is_full_is_no_nodes_fault() -> None:
    verdict = judge([replace(fact, free_gib=1.0) for fact in nodes()], CLUSTER)
    assert "n1 has 1.0 GiB free" in verdict.sentence and verdict.failed == {}


def test_fake_gpus_of_a_cluster_on_cpus_are_not_looked_for() -> None:
    assert judge(nodes({"gpus": 0}), replace(CLUSTER, device="cpu")).sentence is None


def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only rank of a job looks at its node, too."""
    monkeypatch.setenv("MEGATRON_TOWER_JOB", f"{tmp_path}")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    preflight.alone(ClusterConfig(name="test"), [tmp_path / "not/yet/there"])
    with pytest.raises(NodeError, match=r"^n7 shows 0 of 1 GPUs and has [\d.]+ GiB free where cluster.disk_gib=100000000.0"):
        preflight.alone(ClusterConfig(name="test", gpus_per_node=8, disk_gib=1e8), [tmp_path / "not/yet/there"])
    assert "shows 0 of 1 GPUs" in json.loads((tmp_path / "failed_nodes.json").read_text())["n7"]


@pytest.mark.parametrize(
    ("missing", "failed"),
    [([2], {"n2"}), ([2, 3, 5], {"n2", "n3"}), ([2, 3, 4, 5, 6, 7], {"n1"}), ([1], {"n1"})],
    ids=lambda value: str(sorted(value)),
)
def test_missing_ranks(monkeypatch: pytest.MonkeyPatch, missing: list[int], failed: set[str]) -> None:
    """Their nodes are at fault; where no other node can be heard, it is rank 0's."""
    monkeypatch.setenv("MEGATRON_TOWER_NODES", "n1,n2,n3,n4")
    meeting = host(monkeypatch)
    verdict = meeting._missing(missing)
    assert set(verdict.failed) == failed
    assert all(f"rank {rank} on n{rank // 2 + 1}" in verdict.sentence for rank in missing)


def host(monkeypatch: pytest.MonkeyPatch) -> preflight.Meeting:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", f"{port}")
    meeting = preflight.Meeting(Place(0, 8, 0), CLUSTER)
    watchdog.disarm()
    return meeting


def test_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", f"{taken.getsockname()[1]}")
        monkeypatch.setenv("SLURMD_NODENAME", "n1")
        with pytest.raises(NodeError, match=rf"port {taken.getsockname()[1]} of n1, where the ranks shall meet, is taken"):
            preflight.Meeting(Place(0, 2, 0), CLUSTER)
    watchdog.disarm()
