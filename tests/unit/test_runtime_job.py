"""What a Slurm job starts, where, and how it counts its starts; what becomes of one on a real Slurm: tests/slurm/test_jobs.py."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.config import REPOSITORY, ClusterConfig, ContainerConfig
from megatron_tower.runtime import job, ports, slurm
from megatron_tower.runtime.job import Job

CLUSTER = ClusterConfig(name="mine", launcher="slurm", ranks_per_node=8, gpus_per_node=8, cpus_per_rank=12, srun=["--mpi=none"])


def of_ranks(folder: Path, ranks: int, container: ContainerConfig | None = None) -> Job:
    progress = folder / "latest"
    return Job("megatron_tower.train", ("phase=sft",), replace(CLUSTER, container=container), ranks, folder, progress=progress)


def test_one_srun_starts_a_task_a_rank(tmp_path: Path) -> None:
    words = of_ranks(tmp_path, 16).command(tmp_path)
    size = ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"]
    asked = ["srun", *size, "--kill-on-bad-exit=1", "--wait=60", "--mpi=none"]
    assert [word for word in words if word in asked] == asked
    assert f"--output={tmp_path}/rank_%5t.log" in words and words[-3:] == ["-m", "megatron_tower.train", "phase=sft"]
    assert of_ranks(tmp_path, 4).command(tmp_path)[1:4] == ["--nodes=1", "--ntasks=4", "--ntasks-per-node=4"]


def test_ranks_run_in_their_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pyxis = " ".join(of_ranks(tmp_path, 8, ContainerConfig("pyxis", "/images/a.sqsh", ["/data", "/x:/y"])).command(tmp_path))
    mounts = f"--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data,/x:/y"
    assert f"--container-image=/images/a.sqsh {mounts} --container-workdir={tmp_path} python -m megatron_tower.train phase=sft" in pyxis
    apptainer = " ".join(of_ranks(tmp_path, 8, ContainerConfig("apptainer", "/images/a.sif", ["/data"])).command(tmp_path))
    binds = f"--bind {REPOSITORY} --bind /data --pwd {tmp_path}"
    assert f"apptainer exec --nv {binds} /images/a.sif python -m megatron_tower.train phase=sft" in apptainer


def test_ports_are_those_of_the_job_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    first = job._port("1000")
    assert first in ports.PORTS and job._port("1001") == first + 1
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "two")
    assert job._port("1000") not in (first, first + 1)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert job._port("1000") == first + 1


def test_starts_that_saved_nothing_are_counted_back_to_the_last_that_did(tmp_path: Path) -> None:
    one = of_ranks(tmp_path, 8)
    starts = [None, "step_00000010", "step_00000020", "step_00000020"]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps({"from": start}) + "\n" for start in starts))
    one.progress.write_text("step_00000020\n")
    assert one._idle_starts(tmp_path) == 2
    one.progress.write_text("step_00000030\n")
    assert one._idle_starts(tmp_path) == 0


def test_a_task_of_an_array_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task's job id is that of the whole array."""
    monkeypatch.setenv("SLURM_JOB_ID", "93")
    assert slurm.handle() == "93"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "93")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert slurm.handle() == "93_4"


def test_a_job_without_room_for_the_ranks_is_refused_with_the_options_that_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["cluster=gpu_apptainer", f"run_dir={tmp_path}", "parallel.data=8"]  # two nodes of four ranks, 8 CPUs each
    job = Job.of(load(words), "megatron_tower.train", words)
    for told, fits in (("32(x2)", True), ("16,64(x2),8", True), ("32", False), ("64,8", False), ("4(x2)", False)):
        monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", told)
        assert (job.too_small(slurm.cpus()) is None) is fits, told
    assert job.run() == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "takes --nodes=2 --ntasks-per-node=4 --cpus-per-task=8" in said and "this job has 2 nodes of 4 CPUs" in said


def test_excluded_nodes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "ask", lambda *command: asked.append(command) or "n[1-2]")
    slurm.requeue("7", ["n5"])
    assert asked[1:] == [("scontrol", "requeue", "7"), ("scontrol", "update", "JobId=7", "ExcNodeList=n[1-2],n5")]


def test_logs_lie_with_what_they_tell_of(tmp_path: Path) -> None:
    words = ["cluster=local_slurm", f"run_dir={tmp_path}", "parallel=tp2", "phase=sft", "eval.checkpoint=runs/mine/sft"]
    cfg = load(words)
    train, evaluate, data = (Job.of(cfg, module, words) for module in ("megatron_tower.train", "evaluation.run", "tools.prepare_data"))
    assert (train.ranks, evaluate.ranks, data.ranks) == (2, 2, 1)
    assert (train.folder, train.done, train.triggers) == (tmp_path / "sft/logs", tmp_path / "sft/finished.json", tmp_path / "triggers")
    assert evaluate.folder == Path("runs/mine/sft/evaluation/logs").absolute() and data.folder == tmp_path / "logs"


@pytest.mark.parametrize(
    "words, said",
    [
        (["cluster=h100_pyxis", "parallel.data=12"], "12 ranks and cluster=h100_pyxis has 8 a node"),
        (["cluster=gpu_apptainer", "parallel.data=64"], "holds 8 nodes x 4"),
        (["cluster=gpu_apptainer", "cluster.ranks_per_node=2"], "start one rank a GPU"),
        (["cluster=gpu_apptainer", "cluster.container.runtime=docker"], "cluster.container.runtime=docker is unknown"),
    ],
)
def test_layouts_that_do_not_fit_the_cluster_are_refused(words: list[str], said: str) -> None:
    from megatron_tower.config import InputError

    with pytest.raises(InputError, match=said):
        load(words)
