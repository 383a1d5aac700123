"""What the files in slurm/ run: a command of this repository as the work of the Slurm job that this process is in.

    python -m megatron_tower.job megatron_tower.train phase=cpt model=gemma2_9b cluster=my_cluster
    python -m megatron_tower.job tools.convert_megatron_to_hf cluster=my_cluster --checkpoint runs/mine/sft --output exported

Where the command takes options, words that begin with `cluster` are the job's own, and its logs are in ./logs. Leaves out: submitting
(`megatron_tower.launch`).
"""

import sys
from pathlib import Path

from megatron_tower.command import load, refuse
from megatron_tower.config import InputError, check_phase
from megatron_tower.runtime import slurm
from megatron_tower.runtime.job import TRAIN, Job


def main() -> None:
    module, *words = sys.argv[1:]
    try:
        if slurm.job_id() is None:
            raise InputError("this process is in no Slurm job: submit it, as in sbatch slurm/train.sbatch phase=cpt cluster=my_cluster")
        sys.exit(job(module, words).run())
    except InputError as error:
        refuse(error)


def job(module: str, words: list[str]) -> Job:
    """Raises InputError for words that make no config, a phase that can't run, or a cluster without Slurm."""
    takes_options = any(word.startswith("--") for word in words)
    own = [word for word in words if word.startswith("cluster")] if takes_options else words
    cfg = load(own)
    if cfg.cluster.launcher != "slurm":
        raise InputError(f"cluster={cfg.cluster.name} has launcher={cfg.cluster.launcher}: name one of Slurm, as in cluster=local_slurm")
    if takes_options:
        return Job(module, tuple(word for word in words if word not in own), cfg.cluster, ranks=1, folder=Path("logs").absolute())
    if module == TRAIN:
        check_phase(cfg)
    return Job.of(cfg, module, words)


if __name__ == "__main__":
    main()
