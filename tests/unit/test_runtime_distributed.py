"""A rank finds its place in each of the three environments, and is told when the layout does not fit."""

from pathlib import Path

import pytest

from megatron_tower.config import ClusterConfig, InputError, ParallelConfig
from megatron_tower.runtime import distributed
from megatron_tower.runtime.distributed import Place, place

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, Place(3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Place(0, 1, 0)),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Place) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


def test_wrong_number_of_ranks() -> None:
    with pytest.raises(InputError, match=r"parallel=tp2 needs 2 ranks .* and 1 are running"):
        distributed.initialize(ParallelConfig(name="tp2", tensor=2), 1, ClusterConfig(name="local"))


@pytest.mark.parametrize(("cuda", "asked"), [(False, "cuda"), (True, "cpu")])
def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, cuda: bool, asked: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    with pytest.raises(InputError, match=f"cluster.device={asked}"):
        distributed.initialize(ParallelConfig(name="single"), 1, ClusterConfig(name="local", device=asked))


def test_slurm_master(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ranks of a job meet on its first node, at a port that two jobs hardly share."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-9]" ] && printf "node7\\nnode8\\nnode9\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-9]")
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    assert distributed._slurm_master() == {"MASTER_ADDR": "node7", "MASTER_PORT": "23456"}


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert distributed.threads_per_rank(ClusterConfig(name="local"), ranks_here=3) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert distributed.threads_per_rank(ClusterConfig(name="local"), ranks_here=3) == 1
    assert distributed.threads_per_rank(ClusterConfig(name="local", threads_per_rank=5), ranks_here=3) == 5


def test_may_be_called_again_with_another_layout(single_rank: None) -> None:
    import torch

    first = torch.rand(1)
    distributed.initialize(ParallelConfig(name="single"), 1234, ClusterConfig(name="local"))
    assert torch.equal(first, torch.rand(1))  # seeded afresh
