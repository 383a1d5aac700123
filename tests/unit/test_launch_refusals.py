"""What can't run is refused in one sentence before anything is queued, and of a chain that Slurm refuses nothing stays queued."""

import os
import sys
from pathlib import Path

import pytest

from megatron_tower import launch
from megatron_tower.config import REPOSITORY
from tests.unit.slurm_fakes import GPUS, SLURM, Slurm, fake_slurm, fresh_run, plan, submit  # noqa: F401  fixtures: slurm, run


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
