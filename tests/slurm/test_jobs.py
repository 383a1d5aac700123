"""Jobs as sbatch's files make them: training over two nodes, and what becomes of a job whose ranks end in any way."""

import json
import random
import re
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.distributed import room
from tests.slurm import fire
from tests.unit.test_serve import stand_in


def job(cluster, folder: Path, end: str, *options: str, words: str = "") -> str:
    """One rank that ends as `tests/slurm/cases.py` knows it, its logs in `folder`; `options` are sbatch's."""
    command = f"{sys.executable} -m megatron_tower.job tests.slurm.cases cluster=local_slurm {words} --end {end}"
    common = ["--requeue", "--open-mode=append", f"--output={folder}/%j.out"]
    return cluster.submit(*common, *options, f"--wrap=cd {folder} && exec {command}")


def said(folder: Path, job: str) -> str:
    return (folder / f"{job}.out").read_text()


@pytest.fixture(autouse=True)
def repository_is_found(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "PYTHONPATH", str(fire.REPOSITORY))


def test_two_nodes_of_two_ranks_train_by_sbatch(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of every layout are the same elsewhere (test_layouts); here: ranks, logs, notes without secrets."""
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    monkeypatch.setitem(cluster.env, "MY_API_TOKEN", "not-to-be-seen")
    room.prepare(tmp_path, "gemma2")
    words = room.words(tmp_path, "gemma2", "phase=cpt", "phase.train_steps=6", "parallel=tp2", "parallel.data=2", "cluster=local_slurm")
    number = cluster.submit("--nodes=2", f"--output={tmp_path}/%j.out", "slurm/train.sbatch", *words)
    cluster.wait(number)
    logs = tmp_path / "run/cpt/logs" / number
    assert [json.loads(line)["step"] for line in (tmp_path / "run/cpt/metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in logs.glob("rank_*.log")) == [f"rank_{rank:05d}.log" for rank in range(4)]
    note = (logs / "start_0.txt").read_text()
    assert "--kill-on-bad-exit=1 --wait=60" in note and f"JobId={number}" in note and "SLURM_JOB_NODELIST=n[1-2]" in note
    assert "not-to-be-seen" not in note + (tmp_path / "run/cpt/environment.json").read_text()
    assert "megatron_tower.train: done" in said(tmp_path, number)


def test_a_model_is_served_until_its_job_is_cancelled(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    monkeypatch.setitem(cluster.env, "PATH", stand_in(tmp_path))
    file = tmp_path / "serve" / "m.url"
    number = cluster.submit(f"--output={tmp_path}/%j.out", "slurm/serve.sbatch", "/models/m", str(file))
    cluster.until(file.exists, "the address of the server")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(file.read_text().strip().replace("/v1", "/health")) as answer:
        assert answer.read().startswith(b"serve /models/m --host")
    cluster.ask("scancel", number)
    cluster.wait(number, {"CANCELLED"})
    cluster.until(lambda: not file.exists() and not cluster.processes(number), "the end of the server and its address")


def test_bad_input_is_refused_and_not_requeued(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the job's first process before any rank begins, and by a rank."""
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    words = ["phase=cpt", "cluster=local_slurm", "parallel.tensor=3", f"run_dir={tmp_path}/run"]
    numbers = [cluster.submit(f"--output={tmp_path}/%j.out", "slurm/train.sbatch", *words), job(cluster, tmp_path, "bad-input")]
    for number in numbers:
        cluster.wait(number, {"FAILED"})
        assert cluster.facts(number)["ExitCode"] == "2:0" and cluster.facts(number)["Restarts"] == "0"
    assert "parallel.tensor=3 does not divide them" in said(tmp_path, numbers[0]) and not (tmp_path / "run").exists()


def test_a_job_gives_up_when_its_starts_save_nothing(cluster, tmp_path: Path) -> None:
    number = job(cluster, tmp_path, "crash", words="cluster.idle_restarts=1")
    cluster.wait(number, {"FAILED"})
    assert (cluster.facts(number)["Restarts"], cluster.facts(number)["ExitCode"]) == ("1", "1:0")
    assert said(tmp_path, number).count("requeued") == 2 and "2 starts in a row saved nothing new: not requeued" in said(tmp_path, number)


def test_a_failed_node_is_not_met_again(cluster, tmp_path: Path) -> None:
    number = job(cluster, tmp_path, "first-node-fails")
    cluster.wait(number)
    nodes = [json.loads(line)["nodes"] for line in (tmp_path / "logs" / number / "starts.jsonl").read_text().splitlines()]
    assert len(nodes) == 2 and nodes[0] != nodes[1]
    assert f"requeued, without {nodes[0]}" in said(tmp_path, number) and cluster.facts(number)["ExcNodeList"] == nodes[0]


def test_scancel_is_final_and_leaves_nothing(cluster, tmp_path: Path) -> None:
    """Two jobs on one node, whose ranks meet at different ports."""
    numbers = [job(cluster, tmp_path, "sleep", "--nodelist=n1") for _ in range(2)]
    logs = [tmp_path / "logs" / number / "rank_00000.log" for number in numbers]
    cluster.until(lambda: all(log.exists() and "port" in log.read_text() for log in logs), "both ranks run")
    ports = {re.search(r"rank on n1 port (\d+) address 127\.0\.0\.1", log.read_text())[1] for log in logs}
    assert len(ports) == 2
    for number in numbers:
        cluster.ask("scancel", number)
    for number in numbers:
        cluster.wait(number, {"CANCELLED"})
        cluster.until(lambda number=number: not cluster.processes(number), "no process is left")
        assert "ended by Slurm" in said(tmp_path, number) and cluster.facts(number)["Restarts"] == "0"


def test_a_stop_file_keeps_a_job_from_the_queue(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's later jobs, which wait for this one to end well, go with it."""
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    (tmp_path / "triggers").mkdir()
    (tmp_path / "triggers/stop").touch()
    room.prepare(tmp_path, "gemma2")
    words = room.words(tmp_path, "gemma2", "phase=cpt", "cluster=local_slurm", f"run_dir={tmp_path}")
    number = cluster.submit(f"--output={tmp_path}/%j.out", "slurm/train.sbatch", *words)
    cluster.wait(number, {"FAILED"})
    assert f"{tmp_path}/triggers/stop is there" in said(tmp_path, number) and cluster.facts(number)["Restarts"] == "0"
    assert not (tmp_path / "cpt/checkpoints").exists()


def test_under_fire(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short selection; `python -m tests.slurm.fire` has all faults and many moments."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(fire.REPOSITORY)
    straight = fire.undisturbed(tmp_path, steps=70)
    for fault in ("SIGKILL of one rank", "preemption"):
        outcome = fire.under_fire(fault, tmp_path, tmp_path / fault.replace(" ", "_"), straight, random.Random(fault))
        assert outcome.verdict == "bit-equal" and outcome.starts == 2, f"{outcome}"
