"""Submitting with stand-ins for Slurm's commands: which jobs, in which order, with which resources; what is refused; what is told."""

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tower import launch
from megatron_tower.config import REPOSITORY, ClusterConfig
from megatron_tower.runtime import queue
from megatron_tower.runtime.job import Job

TOOLS = {
    "sbatch": """
        echo sbatch "$@" >> calls
        if [ "$1" = --test-only ]; then cat > judged; [ ! -e judgement ] || { cat judgement >&2; exit 1; }; exit 0; fi
        echo x >> count; id=$((100 + $(wc -l < count)))
        [ ! -e "refuse_$id" ] || { echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1; }
        cp "$1" "$id.sh"; echo "Submitted batch job $id" """,
    "sinfo": "[ ! -e down ] || { echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1; }; cat nodes",
    "squeue": "cat queue",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "scancel": 'echo scancel "$@" >> calls',
    "srun": "exit 1",
}
SLURM = [
    "cluster=local_slurm",
    "cluster.ranks_per_node=4",
    "parallel.data=8",
    "phase.seq_length=256",
    "phase.global_batch_size=64",
    "phase.micro_batch_size=8",
]
GPUS = ["cluster.gpus_per_node=4", "cluster.cpus_per_rank=3"]


class Slurm:
    """A folder in which the stand-ins keep what they were asked, and find what they are to answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, script in TOOLS.items():
            tool = folder / "bin" / name
            tool.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
            tool.chmod(0o755)
        self.nodes("main*|4|16|64000|gpu:4(S:0-1)", "big|2|64|512000|gpu:h100:8,nvme:1")
        (folder / "queue").touch()
        (folder / "calls").touch()

    def nodes(self, *kinds: str) -> None:
        (self.folder / "nodes").write_text("".join(f"{kind}\n" for kind in kinds))

    def queue(self, *jobs: tuple[str, str, int, str, Path]) -> None:
        """What squeue knows: (id, state, restarts, reason, file of the output)."""
        rows = [f"{number:<20}{state:<20}{restarts:<10}{reason:<40}{out!s:<1000}\n" for number, state, restarts, reason, out in jobs]
        (self.folder / "queue").write_text("".join(rows))

    @property
    def calls(self) -> str:
        return (self.folder / "calls").read_text()

    @property
    def scripts(self) -> dict[str, str]:
        """Script of each submitted job, by the title of its step."""
        texts = [path.read_text() for path in sorted(self.folder.glob("1*.sh"))]
        return {re.search(r"--job-name='?(?:run|evaluation)/(.+?)'?\n", text)[1]: text for text in texts}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "plan", lambda words: plan(*words))
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run")


@functools.cache
def plan(*words: str, composed: Callable = launch.plan) -> tuple:
    """Composing takes its time, and the same words give the same plan: paths are relative."""
    return composed(list(words))


def submit(run: Path, *words: str, dry_run: bool = False) -> None:
    launch.submit([*SLURM, f"run_dir={run}", "data.folder=data", *words], dry_run)


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


def test_half_a_chain_is_taken_back(slurm, run):
    (slurm.folder / "refuse_104").touch()
    with pytest.raises(launch.InputError, match=r"Slurm refuses the job: Job violates accounting/QOS policy \(cluster.qos=None\)"):
        submit(run, "recipe=demo")
    assert "scancel 101 102 103\n" in slurm.calls
    assert launch.read(run) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster.partition=nope"], "cluster.partition=nope is unknown here: use one of main, big"),
        ([*GPUS, "cluster.gpus_per_node=8", "cluster.ranks_per_node=8"], "8 GPUs, and none of partition main has more than 4"),
        (["cluster.cpus_per_rank=5"], "asks a node for 20 CPUs, and none of partition main has more than 16"),
        (["cluster.memory_per_node=65G"], "asks a node for 66560 MiB of memory, and none of partition main has more than 64000"),
        (["parallel.data=32"], "8 nodes of 4 ranks are asked for, and partition main has 4 that hold them"),
        (["parallel.data=8", "cluster.max_nodes=1"], "makes 8 ranks and cluster=local_slurm holds 1 nodes x 4"),
        (["parallel.data=6"], "6 ranks and cluster=local_slurm has 4 a node"),
        (["run_dir=/proc/nowhere/run"], "run_dir=/proc/nowhere/run can't be written"),
        ([f"run_dir={REPOSITORY}/README.md/run"], "README.md is no folder"),
        (["recipe=demo"], "leave out one of them"),
        (["phase.train_steps=3"], "give either phase.train_steps or phase.epochs"),
    ],
)
def test_what_can_not_run_is_refused_in_one_sentence(slurm, run, capsys, monkeypatch, words, sentence):
    refusal = refused(run, capsys, monkeypatch, *words)
    assert sentence in refusal
    assert not list(slurm.folder.glob("1*.sh")) and not run.exists()


def refused(run: Path, capsys, monkeypatch, *words: str) -> str:
    """What the command line says, having ended with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["launch", "phase=sft", *SLURM[:4], "phase.global_batch_size=192", f"run_dir={run}", *words])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and told.startswith("error: "), told
    return told


def test_a_refusal_inside_of_a_job_is_not_that_jobs(slurm, run, capsys, monkeypatch, tmp_path):
    """A training submits evaluations of its checkpoints: one that can't run must not end the training, nor lead its own ranks astray."""
    monkeypatch.setenv("MEGATRON_TOWER_JOB", str(tmp_path))
    monkeypatch.setenv("MEGATRON_TOWER_END_TIME", "1")
    assert "nope is unknown here" in refused(run, capsys, monkeypatch, "cluster.partition=nope")
    assert not (tmp_path / "refused").exists() and "MEGATRON_TOWER_END_TIME" not in os.environ


def test_sbatch_is_the_judge_of_the_rest(slurm, run, capsys, monkeypatch):
    (slurm.folder / "judgement").write_text("allocation failure: Invalid account or account/partition combination specified\n")
    told = refused(run, capsys, monkeypatch, "cluster.account=hers")
    assert "combination specified (cluster.account=hers, cluster.partition=main); sacctmgr show associations" in told
    assert "#SBATCH --account=hers" in (slurm.folder / "judged").read_text()
    (slurm.folder / "judgement").write_text("allocation failure: Requested node configuration is not available\n")  # nodes are down
    submit(run, "phase=sft")
    assert list(slurm.scripts) == ["train sft"]


def test_without_slurm_or_without_an_answer_the_sentence_says_so(slurm, run, capsys, monkeypatch):
    (slurm.folder / "down").touch()
    assert "Slurm does not answer (sinfo" in refused(run, capsys, monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    told = refused(run, capsys, monkeypatch)
    assert "cluster=local_slurm needs" in told and "sbatch" in told and "cluster=local" in told


def test_a_run_that_was_told_to_stop_is_not_submitted(slurm, run, capsys, monkeypatch):
    (run / "triggers").mkdir(parents=True)
    (run / "triggers" / "stop").touch()
    assert "triggers/stop is there, at which jobs stop: remove it" in refused(run, capsys, monkeypatch)


def test_a_phase_of_another_configuration_is_refused_before_it_is_queued(slurm, run, capsys, monkeypatch):
    from omegaconf import OmegaConf

    cfg, _ = plan(*SLURM, "phase=sft", f"run_dir={run}")
    cfg.phase_dir.mkdir(parents=True)
    (cfg.phase_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    told = refused(run, capsys, monkeypatch, "phase.optimizer.lr=0.5")
    assert "run/sft was made with another configuration" in told and "phase.optimizer.lr: 7e-06 -> 0.5" in told


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
