"""What a process asks of Slurm, by its own commands: which nodes, until when, a requeue. Imports no torch.

Leaves out: submitting (`megatron_tower/launch.py`), what a job does with the answers (`runtime/job.py`).
"""

import os
import re
import shutil
import subprocess
import time
from datetime import datetime

from megatron_tower.config import ClusterConfig, InputError

PATIENCE = 60  # seconds for an answer of slurmctld
TRIES = 5  # at a requeue, a slurmctld may be restarting


def job_id() -> str | None:
    """The job that this process belongs to, if any; each task of an array has an id of its own."""
    return os.environ.get("SLURM_JOB_ID")


def restart() -> int:
    """How often the job was requeued before this start."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def handle() -> str:
    """This job as Slurm's commands know it alone: the last task of an array has the id of the array, which means all of its tasks."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def in_step() -> bool:
    """Whether this process was started by srun, not by sbatch or from the shell of salloc."""
    return "SLURM_STEP_ID" in os.environ


def require(cluster: ClusterConfig) -> None:
    """Raise InputError where Slurm's commands are not installed."""
    if not shutil.which("sbatch"):
        raise InputError(
            f"cluster={cluster.name} needs Slurm and sbatch is not on the PATH: run on a login node of the cluster, or use cluster=local"
        )


def ask(*command: str) -> str:
    """Output of one of Slurm's commands; RuntimeError, with its own words, when it fails or is silent for PATIENCE seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} gave no answer within {PATIENCE} s: is slurmctld up?") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def nodes() -> list[str]:
    """Names of this job's nodes, the one that runs the batch script first."""
    return ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def cpus() -> list[int]:
    """CPUs that this job has on each of its nodes; none where Slurm does not say."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))  # 72(x2),36
    return [int(count) for count, nodes in counts for _ in range(int(nodes or 1))]


def address(node: str) -> str:
    """Where Slurm itself reaches a node: its name on most clusters."""
    facts = dict(word.split("=", 1) for word in ask("scontrol", "show", "node", "--oneliner", node).split() if "=" in word)
    return facts.get("NodeAddr", node)


def end_time(job: str) -> float | None:
    """Unix seconds at which Slurm ends a running job; None without a time limit."""
    told = ask("squeue", "--noheader", f"--jobs={job}", "--format=%e")
    try:
        return datetime.fromisoformat(told).timestamp()
    except ValueError:
        return None


def requeue(job: str, exclude: list[str]) -> None:
    """Put a running batch job back into the queue, never again on the nodes in `exclude`; RuntimeError when Slurm refuses.

    Slurm lets a pending job's list of excluded nodes be changed, and the job can't start before the caller has ended.
    """
    before = ask("squeue", "--noheader", f"--jobs={job}", "--format=%x") if exclude else ""
    _patiently("scontrol", "requeue", job)
    if exclude:
        _patiently("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([before, *exclude]).strip(',')}")


def _patiently(*command: str) -> None:
    for left in reversed(range(TRIES)):
        try:
            ask(*command)
            return
        except RuntimeError:
            if not left:
                raise
            time.sleep(2)
