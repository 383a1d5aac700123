"""A phase as a job of a real Slurm, and evaluations as jobs: of a checkpoint beside the training, metrics apart; as an array."""

import csv
import json
import sys
from pathlib import Path

import pytest

from megatron_tower.data import manifest
from tests.distributed import room
from tests.slurm.test_launch_chain import ids, launch, losses
from tests.unit.comet_folders import comet_folder, encoder_folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a training that has held-out translations, and of how they are scored."""
    folder = tmp_path_factory.mktemp("evaluations")
    room.prepare(folder, "gemma2")
    rows = [
        {"kind": "noun", "source_locale": a, "target_locale": b, "source": f"the {word}", "reference": word}
        for a, b in (("en", "de_DE"), ("de_DE", "en"))
        for word in room.WORDS[:3]
    ]
    data, facts = folder / "gemma2", manifest.read(folder / "gemma2")
    (data / "held_out").mkdir()
    (data / "held_out/translation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.write(data, facts)
    asked = ["eval.tasks=[translation]", "eval.max_new_tokens=8", "eval.bootstrap_samples=20"]
    return room.words(folder, "gemma2", "phase=cpt", "cluster=local_slurm", *asked)


def table(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "scores.json").read_text())
    return {f"{row['task']} {row['metric']}": row["value"] for row in found["scores"] if row["by"] == "all"}


@pytest.fixture(scope="module")
def trained(cluster, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a phase whose job is over. Evaluations are submitted, and do not begin within the hour."""
    folder = tmp_path_factory.mktemp("metric")
    kiwi = comet_folder("unified_metric", encoder_folder(folder / "encoder", [" ".join(room.WORDS)]), folder / "kiwi")
    evaluation = f"['parallel=single','parallel.data=1','+eval.metrics.kiwi={kiwi}','+cluster.sbatch.begin=now+1hour']"
    every = ["phase.train_steps=3", "phase.save_every=2", "phase.keep_every=2", "phase.evaluate_every=2"]
    launch(cluster, *words, *every, f"phase.evaluate_words={evaluation}", "parallel=tp2", "parallel.data=2")
    run = Path(next(word for word in words if word.startswith("run_dir=")).removeprefix("run_dir="))
    cluster.wait(ids(run)["train cpt"])
    return run / "cpt"


def test_one_phase_trains_on_two_nodes_of_two_ranks(cluster, trained: Path) -> None:
    job = ids(trained.parent)["train cpt"]
    assert cluster.facts(job)["NumNodes"] == "2"
    assert len(list((trained / "logs" / job).glob("rank_*.log"))) == 4 and len(losses(trained.parent, "cpt")) == 3


def test_a_checkpoint_is_scored_by_jobs_that_training_does_not_wait_for(cluster, trained: Path) -> None:
    """The second of them, for the neural metrics, waits for the first one."""
    assert (trained / "finished.json").exists()
    found = trained / "evaluation_step_00000002"
    assert [path.name for path in trained.glob("evaluation_*")] == [found.name]
    jobs = ids(found)
    assert list(jobs) == ["evaluate step_00000002", "score step_00000002"]
    generating, scoring = jobs.values()
    assert f"afterok:{generating}" in cluster.facts(scoring)["Dependency"] and cluster.state(generating) == "PENDING"
    for job in jobs.values():
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.wait(generating)
    assert "translation chrf" in (scored := table(found)) and "translation kiwi" not in scored
    cluster.wait(scoring)
    assert table(found).keys() == scored.keys() | {"translation kiwi"}


def test_an_array_of_evaluations_is_one_table(cluster, trained: Path, words: list[str], tmp_path: Path) -> None:
    checkpoints = [trained / "checkpoints/step_00000002", trained]
    swept = ["eval.checkpoint=" + ",".join(map(str, checkpoints)), f"hydra.sweep.dir={tmp_path}", "hydra/launcher=submitit_slurm"]
    done = cluster.run(sys.executable, "-m", "evaluation.run", "-m", *words, *swept, timeout=300)
    assert done.returncode == 0 and "2 of 2 cells done" in done.stdout, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    jobs = [(tmp_path / row["Cell"] / "job").read_text() for row in rows]
    assert jobs == [f"{jobs[0].split('_')[0]}_{task}" for task in (0, 1)]
    assert [(row["checkpoint"], row["State"]) for row in rows] == [(str(checkpoint), "done") for checkpoint in checkpoints]
    for row in rows:
        assert row["Translation chrF++"] == f"{table(Path(row['Outputs']))['translation chrf']:.1f}"
