"""Where jobs wait and run: Slurm's queue, or the background of this machine; both through submitit. Imports no torch.

    place = queue.of(cfg.cluster)
    place.check(jobs)                                # InputError when the cluster can't run them, before any is queued
    submitted = place.submit("mine/train sft", job, after=["4711"])
    queue.states([submitted])[submitted]             # State(word="RUNNING", ...)

A job's script, its pickle and what its first process printed are <folder>/<job id>_*. Leaves out: which jobs a run needs
(`megatron_tower/launch.py`), what happens inside of one (`runtime/job.py`).
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import psutil
from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, JobPaths, pickle_load

from megatron_tower.config import ClusterConfig, InputError
from megatron_tower.runtime import processes, slurm
from megatron_tower.runtime.job import RANKED, Job

# fmt: off
OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED", "UNKNOWN",
)
# fmt: on
GENERATES = "megatron_tower.translate"  # on one GPU; of the other commands only those in RANKED use any
MEANT = {"account": "account", "partition": "partition", "qos": "qos", "feature": "constraint", "time": "time", "memory": "memory_per_node"}
NOT_NOW = "Requested node configuration is not available"  # said of nodes that are down, too, for which a job may wait
MEBIBYTES = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}
YEAR = 365 * 24 * 60  # minutes: submitit wants a limit for what runs on this machine


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted. born: when its process began, for one on this machine, whose id may be another's by now."""

    name: str
    id: str
    folder: str
    born: float | None = None

    @property
    def output(self) -> Path:
        """What its first process prints."""
        return JobPaths(self.folder, self.id).stdout

    @property
    def succeeded(self) -> bool:
        """Whether it ended well, by what it left in its folder."""
        result = JobPaths(self.folder, self.id).result_pickle
        return result.exists() and pickle_load(result)[0] == "success"


@dataclass(frozen=True)
class State:
    """What has become of a job, in Slurm's words; UNKNOWN: it is over, and not known how."""

    word: str
    reason: str = ""
    restarts: int = 0

    @property
    def is_over(self) -> bool:
        return self.word in OVER


@dataclass(frozen=True)
class Resources:
    """What a job asks for; all but `nodes` of each node."""

    nodes: int
    tasks: int
    gpus: int
    cpus: int

    @classmethod
    def of(cls, job: Job) -> "Resources":
        cluster, tasks = job.cluster, job.tasks_per_node
        gpus = tasks if cluster.gpus_per_node and (job.module in RANKED or job.module == GENERATES) else 0
        return cls(job.nodes, tasks, gpus, tasks * cluster.cpus_per_rank)


def of(cluster: ClusterConfig) -> "SlurmQueue | LocalQueue":
    return SlurmQueue(cluster) if cluster.launcher == "slurm" else LocalQueue(cluster)


def states(jobs: Sequence[Submitted]) -> dict[Submitted, State]:
    """What has become of each job."""
    queued = [job for job in jobs if job.born is None]
    known = _in_queue(queued)
    known |= _in_accounts([job for job in queued if job not in known])

    def state(job: Submitted) -> State:
        if job in known:
            return known[job]
        if _process(job):
            return State("RUNNING")
        return State("COMPLETED" if job.succeeded else "UNKNOWN" if job.born is None else "FAILED")

    return {job: state(job) for job in jobs}


def cancel(jobs: Sequence[Submitted]) -> None:
    """End jobs that are not over, without waiting for their end; raises InputError where Slurm does not answer."""
    for process in filter(None, map(_process, jobs)):
        process.terminate()
    if queued := [job.id for job in jobs if job.born is None]:
        _rows("scancel", *queued)


class LocalQueue:
    """Background processes of this machine, which outlive the terminal. They wait for nothing."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster

    def check(self, jobs: Sequence[Job]) -> None:
        pass

    def asks(self, job: Job) -> str:
        return "this machine"

    def text(self, name: str, job: Job, after: Sequence[str]) -> str:
        return shlex.join(["python", "-m", job.module, *job.words])

    def submit(self, name: str, job: Job, after: Sequence[str]) -> Submitted:
        executor = LocalExecutor(job.folder)
        executor.update_parameters(timeout_min=YEAR, stderr_to_stdout=True)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: the terminal may be closed
        started = executor.submit(_run_here, job, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return Submitted(name, started.job_id, str(job.folder), psutil.Process(int(started.job_id)).create_time())


class SlurmQueue:
    """Slurm's queue."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise InputError, naming the setting, when one of the jobs can't run here. Nothing is written."""
        slurm.require(self.cluster)
        kinds = _node_kinds(self.cluster)
        shapes = {(Resources.of(job), job.cluster.time): job for job in jobs}
        for resources, _ in shapes:
            if problem := next(_unfit(self.cluster, resources, kinds), None):
                raise InputError(problem)
        for job in shapes.values():
            done = subprocess.run(
                ["sbatch", "--test-only"],
                input=self.text("test", job, []),
                capture_output=True,
                text=True,
                timeout=slurm.PATIENCE,
            )
            if done.returncode and NOT_NOW not in done.stderr:
                raise self._refused(done.stderr)

    def asks(self, job: Job) -> str:
        """What the job asks for, for people."""
        asked = Resources.of(job)
        gpus = f", {asked.gpus} GPU" if asked.gpus else ""
        return f"{asked.nodes} x ({asked.tasks} task{'s' * (asked.tasks > 1)}{gpus}, {asked.cpus} CPU), {job.cluster.time}"

    def text(self, name: str, job: Job, after: Sequence[str]) -> str:
        """The script that would be submitted."""
        executor = self.executor(name, job, after)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self, name: str, job: Job, after: Sequence[str]) -> Submitted:
        """Queue a job that begins when those with the ids in `after` have ended well; raises InputError when it is refused."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # to which submitit repeats what sbatch said
                queued = self.executor(name, job, after).submit(_run_in_slurm, job)
        except FailedJobError as error:
            raise self._refused(str(error)) from error
        return Submitted(name, queued.job_id, str(job.folder))

    def executor(self, name: str, job: Job, after: Sequence[str]) -> SlurmExecutor:
        cluster, asked = job.cluster, Resources.of(job)
        options = {"time": cluster.time, "requeue": True}
        if after:
            options["kill-on-invalid-dep"] = "yes"  # or what can never begin stays queued
        executor = SlurmExecutor(job.folder)
        executor.update_parameters(
            job_name=name,
            nodes=asked.nodes,
            ntasks_per_node=asked.tasks,
            cpus_per_task=cluster.cpus_per_rank,
            gpus_per_node=asked.gpus or None,
            mem=cluster.memory_per_node,
            partition=cluster.partition,
            account=cluster.account,
            qos=cluster.qos,
            constraint=cluster.constraint,
            signal_delay_s=cluster.signal_seconds,
            dependency=f"afterok:{':'.join(after)}" if after else None,
            setup=list(cluster.setup),
            wckey=None,
            stderr_to_stdout=True,
            use_srun=False,  # the job starts its ranks itself
            additional_parameters=options | {key: True if value == "true" else value for key, value in cluster.sbatch.items()},
        )
        return executor

    def _refused(self, said: str) -> InputError:
        """sbatch's own words, with the settings that they mean."""
        words = re.findall(r"(?:sbatch: error: |allocation failure: |sbatch: )(.+)", said) or said.strip().splitlines()[-1:]
        text = "; ".join(dict.fromkeys(word.strip().removeprefix("Batch job submission failed: ") for word in words))
        said_of = [key for word, key in MEANT.items() if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
        meant = [f"cluster.{key}={getattr(self.cluster, key)}" for key in said_of]
        yours = "; sacctmgr show associations user=$USER format=account,partition,qos lists yours" if "account" in said_of else ""
        return InputError(f"Slurm refuses the job: {text} ({', '.join(meant) or f'conf/cluster/{self.cluster.name}.yaml'}){yours}")


def _run_in_slurm(job: Job) -> None:
    """What submitit runs: a failed job must end with its exit code, which those that depend on it wait for."""
    if code := job.run():
        sys.exit(code)


def _run_here(job: Job, devices: str | None) -> None:
    """The same on this machine. submitit hides all GPUs from a job that asks for none."""
    if devices is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    process = processes.start([sys.executable, "-m", job.module, *job.words])
    with processes.forwarding([process]):
        code = process.wait()
    if code or (job.done and not job.done.exists()):
        sys.exit(code or 1)


def _process(job: Submitted) -> psutil.Process | None:
    """The process of a job on this machine, while it runs."""
    if job.born is None:
        return None
    try:
        process = psutil.Process(int(job.id))
        alive = process.create_time() == job.born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one partition that are alike."""

    partition: str
    is_default: bool
    count: int
    cpus: int
    mebibytes: int
    gpus: int

    def holds(self, asked: Resources, mebibytes: float) -> bool:
        return self.gpus >= asked.gpus and self.cpus >= asked.cpus and self.mebibytes >= mebibytes


def _node_kinds(cluster: ClusterConfig) -> list[NodeKind]:
    try:
        told = slurm.ask("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G")
    except RuntimeError as error:
        raise InputError(f"cluster={cluster.name}: Slurm does not answer ({error}); cluster=local runs here") from error
    kinds = []
    for line in told.splitlines():
        partition, count, cpus, mebibytes, gres = line.split("|")
        gpus = sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
        kinds.append(NodeKind(partition.rstrip("*"), partition.endswith("*"), int(count), int(cpus), int(mebibytes), gpus))
    return kinds


def _unfit(cluster: ClusterConfig, asked: Resources, kinds: list[NodeKind]) -> Iterator[str]:
    """Why the nodes can't hold what is asked for."""
    names = ", ".join(dict.fromkeys(kind.partition for kind in kinds))
    wanted = cluster.partition.split(",") if cluster.partition else [kind.partition for kind in kinds if kind.is_default]
    own = [kind for kind in kinds if kind.partition in wanted]
    if cluster.partition and not own:
        yield f"cluster.partition={cluster.partition} is unknown here: use one of {names}"
    elif not own:
        yield f"cluster.partition is not set and Slurm has no default partition: use one of {names}"
    if not own:
        return
    where, mebibytes = f"partition {','.join(dict.fromkeys(wanted))}", _mebibytes(cluster.memory_per_node)
    for what, need, most, keys in (
        ("GPUs", asked.gpus, max(kind.gpus for kind in own), "cluster.gpus_per_node and ranks_per_node"),
        ("CPUs", asked.cpus, max(kind.cpus for kind in own), "cluster.cpus_per_rank or ranks_per_node"),
        ("MiB of memory", mebibytes, max(kind.mebibytes for kind in own), "cluster.memory_per_node"),
    ):
        if need > most:
            yield f"cluster={cluster.name} asks a node for {need:.0f} {what}, and none of {where} has more than {most}: lower {keys}"
    room = max(sum(kind.count for kind in own if kind.partition == name and kind.holds(asked, mebibytes)) for name in wanted)
    if asked.nodes > room:
        yield (
            f"{asked.nodes} nodes of {asked.tasks} ranks are asked for, and {where} has {room} that hold them: "
            "choose a smaller layout or another cluster.partition"
        )


def _mebibytes(memory: str | None) -> float:
    """Of Slurm's way to write an amount; 0 where it is not understood, which sbatch shall judge."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory or "", re.IGNORECASE)
    return int(found[1]) * MEBIBYTES[found[2].upper()] if found else 0


def _in_queue(jobs: Sequence[Submitted]) -> dict[Submitted, State]:
    """States of the jobs that slurmctld remembers: some minutes after their end. An id may be another's, of another cluster or time."""
    if not jobs:
        return {}
    widths = {"JobID": 20, "State": 20, "RestartCnt": 10, "Reason": 40, "STDOUT": 1000}
    columns = ",".join(f"{name}:{width}" for name, width in widths.items())
    asked, known = {(job.id, str(job.output)): job for job in jobs}, {}
    for line in _rows("squeue", "--noheader", "--states=all", f"--jobs={_ids(jobs)}", f"--Format={columns}"):
        ends = list(accumulate(widths.values()))
        number, word, restarts, reason, output = (line[end - width : end].strip() for end, width in zip(ends, widths.values(), strict=True))
        if job := asked.get((number, output.replace("%j", number))):
            known[job] = State(word, "" if reason == "None" else reason, int(restarts))
    return known


def _in_accounts(jobs: Sequence[Submitted]) -> dict[Submitted, State]:
    """States of the jobs that the accounting knows, where there is one."""
    if not jobs or not shutil.which("sacct"):
        return {}
    asked, known = {(job.id, job.name): job for job in jobs}, {}
    fields = "--format=JobIDRaw,State,JobName"
    for line in _rows("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={_ids(jobs)}", fields):
        number, word, name = line.split("|", 2)
        if (job := asked.get((number, name))) and word.split()[0] in OVER:  # CANCELLED by 1000
            known[job] = State(word.split()[0])
    return known


def _ids(jobs: Sequence[Submitted]) -> str:
    return ",".join(job.id for job in jobs)


def _rows(*command: str) -> list[str]:
    """Lines of the output; none where no job is known any more, or nothing keeps accounts."""
    if not shutil.which(command[0]):
        raise InputError(f"the jobs are Slurm's and {command[0]} is not on the PATH: ask on a login node of the cluster")
    try:
        return slurm.ask(*command).splitlines()
    except RuntimeError as error:
        if "Invalid job id" in str(error) or "accounting storage is disabled" in str(error):
            return []
        raise InputError(f"Slurm does not answer: {error}") from error
