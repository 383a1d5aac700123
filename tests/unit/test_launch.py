"""Submitting with stand-ins for Slurm's commands: which jobs, in which order, with which resources; what is told of them later."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tower import launch
from megatron_tower.config import ClusterConfig
from megatron_tower.runtime import queue
from megatron_tower.runtime.job import Job
from tests.unit.slurm_fakes import GPUS, SLURM, Slurm, fake_slurm, fresh_run, plan, submit  # noqa: F401  fixtures: slurm, run


def left(run: Path, *words: str) -> list[str]:
    _, steps = plan(*SLURM, f"run_dir={run}", "data.folder=data", "recipe=demo", *words)
    return [step.title for step in launch.unfinished(steps, launch.read(run))]


def option(script: str, name: str) -> str | None:
    found = re.search(rf"^#SBATCH --{name}=(.*)$", script, re.MULTILINE)
    return found and found[1]


def waits_for(scripts: dict[str, str]) -> dict[str, set[str]]:
    titles = dict(zip((str(101 + i) for i in range(len(scripts))), scripts, strict=True))
    waits = {title: option(script, "dependency") for title, script in scripts.items()}
    assert all(value is None or value.startswith("afterok:") for value in waits.values())
    return {title: {titles[number] for number in value.split(":")[1:]} if value else set() for title, value in waits.items()}


def finish(run: Path, *titles: str) -> None:
    """Leave what the steps leave, and the results of their jobs."""
    from submitit.core.utils import JobPaths, cloudpickle_dump

    _, steps = plan(*SLURM, f"run_dir={run}", "data.folder=data", "recipe=demo")
    for step in steps:
        if step.title in titles and step.leaves:
            step.leaves.parent.mkdir(parents=True, exist_ok=True)
            step.leaves.touch()
    for record in launch.read(run):
        if record.title in titles:
            cloudpickle_dump(("success", None), JobPaths(record.job.folder, record.job.id).result_pickle)


def test_a_phase_waits_for_the_one_before_it_and_not_for_its_evaluation(slurm, run):
    submit(run, "recipe=demo")
    waits = waits_for(slurm.scripts)
    assert waits == {
        "data": set(),
        "base model": {"data"},
        "evaluate base": {"base model"},
        "train cpt": {"base model"},
        "evaluate cpt": {"train cpt"},
        "train sft": {"train cpt"},
        "evaluate sft": {"train sft"},
        "preference pairs": {"train sft"},
        "train wpo": {"preference pairs"},
        "evaluate wpo": {"train wpo"},
        "train grpo": {"train wpo"},
        "evaluate grpo": {"train grpo"},
        "export": {"train grpo"},
        "report": {"evaluate base", "evaluate cpt", "evaluate sft", "evaluate wpo", "evaluate grpo"},
        "translate": {"export"},
    }
    assert all((option(script, "kill-on-invalid-dep") == "yes") == bool(waits[title]) for title, script in slurm.scripts.items())
    assert [record.job.id for record in launch.read(run)] == [str(101 + i) for i in range(15)]


def test_a_job_asks_for_what_its_ranks_need(slurm, run):
    words = ["cluster.time=2-00:00:00", "cluster.account=mine", "cluster.signal_seconds=77", "cluster.memory_per_node=60G"]
    submit(
        run, "recipe=demo", *GPUS, *words, "cluster.setup=[module load cuda]", "+cluster.sbatch.exclusive='true'", "+cluster.sbatch.nice=5"
    )
    for title, nodes, tasks, gpus in (
        ("train cpt", "2", "4", "4"),
        ("evaluate base", "2", "4", "4"),
        ("preference pairs", "2", "4", "4"),
        ("data", "1", "1", None),
        ("export", "1", "1", None),
        ("translate", "1", "1", "1"),
    ):
        script = slurm.scripts[title]
        assert [option(script, name) for name in ("nodes", "ntasks-per-node", "gpus-per-node")] == [nodes, tasks, gpus], title
        for name, value in (("cpus-per-task", "3"), ("time", "2-00:00:00"), ("account", "mine"), ("mem", "60G"), ("nice", "5")):
            assert option(script, name) == value
        assert option(script, "signal") == "USR2@77"  # the ranks', not the script's (B:)
        assert option(script, "open-mode") == "append" and "#SBATCH --requeue\n" in script and "#SBATCH --exclusive\n" in script
        assert "\nmodule load cuda\n" in script and "srun" not in script


def test_a_job_brings_its_configuration(slurm, run):
    from submitit.core.utils import DelayedSubmission

    submit(run, "phase=sft", "cluster.idle_restarts=9")
    assert list(slurm.scripts) == ["train sft"]
    (job,) = DelayedSubmission.load(run / "sft" / "logs" / "101_submitted.pkl").args
    assert job.module == "megatron_tower.train" and "phase=sft" in job.words
    assert (job.ranks, job.cluster.idle_restarts, job.done) == (8, 9, run / "sft" / "finished.json")


def test_a_dry_run_asks_sbatch_and_writes_nothing(slurm, run, capsys):
    submit(run, "recipe=demo", dry_run=True)
    told = capsys.readouterr().out
    assert told.count("#!/bin/bash") == 15 and "--dependency='afterok:<train cpt>'" in told
    assert set(slurm.calls.splitlines()) == {"sbatch --test-only"}
    assert not run.exists()


def test_what_is_queued_is_not_queued_again(slurm, run):
    submit(run, "phase=sft")
    out = run.absolute() / "sft" / "logs" / "%j_0_log.out"
    slurm.queue(("101", "PENDING", 0, "Resources", out))
    with pytest.raises(launch.InputError, match=r"queued or running .*101, train sft"):
        submit(run, "phase=cpt")
    slurm.queue(("101", "RUNNING", 0, "None", Path("/another/run/%j_0_log.out")))  # the same number, somebody else's
    submit(run, "phase=sft")
    assert [record.job.id for record in launch.read(run)] == ["101", "102"]


def test_after_a_failure_the_same_words_submit_what_is_left(slurm, run):
    submit(run, "recipe=demo")
    finish(run, "data", "base model", "train cpt", "evaluate cpt", "train sft")  # so the base's evaluation failed, and the pairs
    (run / "base" / "evaluation").mkdir()
    (run / "base" / "evaluation" / "scores.json").touch()  # of an earlier checkpoint
    for script in slurm.folder.glob("1*.sh"):
        script.unlink()
    (slurm.folder / "count").unlink()
    submit(run, "recipe=demo")
    waits = waits_for(slurm.scripts)
    assert list(waits)[:4] == ["evaluate base", "evaluate sft", "preference pairs", "train wpo"]
    assert waits["evaluate base"] == waits["preference pairs"] == set() and waits["train wpo"] == {"preference pairs"}
    assert waits["report"] == {"evaluate base", "evaluate sft", "evaluate wpo", "evaluate grpo"}


def test_work_of_another_configuration_is_done_again(slurm, run):
    submit(run, "recipe=demo")
    every = list(slurm.scripts)
    finish(run, *every)
    assert left(run) == []
    other = left(run, "cluster.time=1:00", "eval.general=3")
    assert "evaluate sft" in other and "report" in other and not [title for title in other if title.startswith("train")]
    (run / "hf" / "config.json").unlink()
    assert left(run) == ["export", "translate"]


def test_status_logs_and_cancel(slurm, run, capsys):
    submit(run, "recipe=demo")
    out, sft = run.absolute() / "logs" / "%j_0_log.out", run.absolute() / "sft"
    slurm.queue(
        ("101", "COMPLETED", 0, "None", out),
        ("102", "FAILED", 0, "NonZeroExitCode", out),
        ("106", "RUNNING", 2, "None", sft / "logs" / "%j_0_log.out"),
        ("107", "PENDING", 0, "Dependency", out),
    )
    (sft / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"step": 8')
    (sft / "logs" / "106").mkdir(parents=True)
    (sft / "logs" / "106" / "rank_00003.log").write_text("lately\nstill going\n")
    (run / "logs" / "102_0_log.out").write_text("newer, but of a job that failed\n")
    capsys.readouterr()
    launch.status(run)
    rows = {cells[0]: cells[1:] for line in capsys.readouterr().out.splitlines() if (cells := [c.strip() for c in line.split("│")[1:-1]])}
    assert rows["train sft"] == ["106", "RUNNING", "2", "sft step 7", ""]
    assert rows["evaluate sft"] == ["107", "PENDING", "", "", "106"]
    assert rows["base model"][1] == "FAILED" and rows["report"][1] == "UNKNOWN"
    launch.logs(run)
    told = capsys.readouterr().out
    assert f"base model: {run.absolute()}/logs/102_0_log.out" in told and told.endswith("rank_00003.log\nlately\nstill going\n")
    launch.cancel(run)
    assert "scancel 106 107\n" in slurm.calls
    assert "cancelled: 106 (train sft), 107 (evaluate sft)" in capsys.readouterr().out


def test_what_slurm_has_forgotten_is_known_by_what_it_left(slurm, run):
    submit(run, "recipe=demo")
    finish(run, "data")
    jobs = {record.title: record.job for record in launch.read(run)}
    assert queue.states([jobs["data"]])[jobs["data"]].word == "COMPLETED"
    assert queue.states([jobs["report"]])[jobs["report"]].word == "UNKNOWN"
    (slurm.folder / "bin" / "sacct").write_text(
        "#!/bin/sh\necho '114|CANCELLED by 0|run/report'; echo '101|FAILED|of an older cluster'; echo '113|RUNNING|run/export'\n"
    )
    found = queue.states(list(jobs.values()))
    assert (found[jobs["report"]].word, found[jobs["data"]].word) == ("CANCELLED", "COMPLETED")
    assert found[jobs["export"]].word == "UNKNOWN"  # its end was never written down


def test_a_job_of_this_machine_outlives_its_submission(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def submitted(*orders: str, done: Path | None = None) -> queue.Submitted:
        job = Job("tests.distributed.exits", orders, ClusterConfig(name="local"), 1, tmp_path / "logs", done)
        return queue.of(job.cluster).submit("run", job, [])

    waiting = submitted("waits")
    endings = {"COMPLETED": submitted("0"), "FAILED": submitted("3"), "UNDONE": submitted("0", done=tmp_path / "finished.json")}
    assert queue.states([waiting])[waiting].word == "RUNNING"
    assert [ended(job) for job in endings.values()] == ["COMPLETED", "FAILED", "FAILED"]
    assert "rank 0 ends with 3" in endings["FAILED"].output.read_text()
    until(lambda: "Loading pickle" in waiting.output.read_text())
    queue.cancel([waiting])
    assert ended(waiting) == "FAILED"
    assert queue.states([replace(waiting, id=str(os.getpid()))]).popitem()[1].is_over  # a process with its number, born later


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ended(job: queue.Submitted) -> str:
    until(lambda: queue.states([job])[job].is_over)
    return queue.states([job])[job].word


def test_on_this_machine_one_process_goes_through_the_recipe(run):
    _, steps = launch.plan(["recipe=demo", f"run_dir={run}"])
    assert [(step.module, step.words) for step in steps] == [("megatron_tower.recipe", ["recipe=demo", f"run_dir={run}"])]


def test_an_evaluation_is_a_job_and_its_neural_metrics_another(run: Path, slurm: Slurm) -> None:
    submit(run, "eval.checkpoint=run/sft", "+eval.metrics.comet22=comet", *GPUS)
    assert waits_for(slurm.scripts) == {"evaluate sft": set(), "score sft": {"evaluate sft"}}
    asked = [[option(script, name) for name in ("nodes", "gpus-per-node")] for script in slurm.scripts.values()]
    assert asked == [["2", "4"], ["1", "1"]]
    assert not (run / "jobs.json").exists() and len(launch.read(run / "sft" / "evaluation")) == 2


def test_one_job_scores_where_there_is_no_neural_metric(run: Path, slurm: Slurm) -> None:
    submit(run, "eval.checkpoint=run/sft")
    assert list(slurm.scripts) == ["evaluate sft"]
