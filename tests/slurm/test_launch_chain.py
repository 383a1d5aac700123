"""The whole recipe as jobs of a real Slurm: the same numbers as on this machine alone. And one job that is cancelled."""

import json
import sys
from pathlib import Path

import pytest

from tests.distributed import tiny_recipe

ON_NODES = ("cluster=local_slurm", "cluster.ranks_per_node=1")
SPEED = ("seconds", "tokens_per_second", "tflops")  # how keys of metrics.jsonl begin that tell of time
STAGES = ("base", "cpt", "sft", "wpo", "grpo")


def launch(cluster, *words: str) -> str:
    return cluster.ask(sys.executable, "-m", "megatron_tower.launch", *words)


def ids(run: Path) -> dict[str, str]:
    return {record["title"]: record["job"]["id"] for record in json.loads((run / "jobs.json").read_text())}


def scores(run: Path, stage: str) -> dict:
    """What a stage's evaluation found, but for the time it took and where its files are."""
    found = json.loads((run / stage / "evaluation" / "scores.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "key", "data", "checkpoint")}


def losses(run: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(SPEED)} for line in lines]


def report(run: Path) -> str:
    return (run / "report.md").read_text().split("## Run time")[0]


@pytest.fixture(scope="module")
def chain(cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    launch(cluster, *tiny_recipe.words(folder), *ON_NODES)
    return folder


def test_the_chain_of_jobs_ends_with_the_same_report(cluster, chain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    alone, said = tiny_recipe.finished(tmp_path_factory)
    jobs = ids(chain / "run")
    assert len(jobs) == 15
    for job in jobs.values():
        cluster.wait(job, seconds=1800)
    for stage in STAGES:
        assert scores(chain / "run", stage) == scores(alone / "run", stage)
    for phase in STAGES[1:]:
        assert losses(chain / "run", phase) == losses(alone / "run", phase)
    assert report(chain / "run") == report(alone / "run")
    translated = next((chain / "run" / "logs" / jobs["translate"]).glob("rank_*.log")).read_text().strip()
    assert translated in said
    assert "grpo step 4" in launch(cluster, "status", f"run_dir={chain / 'run'}")
    again = launch(cluster, *tiny_recipe.words(chain), *ON_NODES)
    assert again.count(" done ") == 15 and ids(chain / "run") == jobs


def test_what_waits_for_a_failed_step_ends_with_it(cluster, tmp_path: Path) -> None:
    launch(cluster, *tiny_recipe.words(tmp_path), *ON_NODES, "data.locales=[xx_XX]")
    jobs = ids(tmp_path / "run")
    cluster.wait(jobs["data"], {"FAILED"})
    assert cluster.facts(jobs["data"])["ExitCode"] == "2:0"
    cluster.wait(jobs["report"], {"CANCELLED"})
    assert "xx_XX" in launch(cluster, "logs", f"run_dir={tmp_path / 'run'}")


def test_cancel_ends_all_that_is_queued(cluster, tmp_path: Path) -> None:
    launch(cluster, *tiny_recipe.words(tmp_path), *ON_NODES, "+cluster.sbatch.begin=now+1hour")
    launch(cluster, "cancel", f"run_dir={tmp_path / 'run'}")
    jobs = ids(tmp_path / "run")
    assert len(jobs) == 15 and {cluster.wait(job, {"CANCELLED"}) for job in jobs.values()} == {"CANCELLED"}
