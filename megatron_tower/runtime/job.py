"""The work of one Slurm job: ranks as the tasks of one srun, and what becomes of the job when they end early.

    sbatch, launch or a sweep -> one process on the job's first node -> srun -> one process a rank

Ranks that were asked to stop (time limit, preemption) save and end well, unfinished: the job puts itself back into the queue and goes on
from there. So does one whose ranks crashed, hung or failed the preflight, without the nodes at fault, until `cluster.idle_restarts`
starts in a row have saved nothing new. Bad input (exit code 2), `triggers/stop` and a scancel end it. The first process runs outside of
any container and imports no torch.

    <folder>/<job id>/start_<n>.txt      the command, the job as Slurm saw it, the environment without secrets
                      rank_<rank>.log    what each rank wrote, in all its starts
                      starts.jsonl       one line a start

    sys.exit(Job.of(cfg, "megatron_tower.train", words).run())

Leaves out: ranks without Slurm (`runtime/local.py`).
"""

import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_tower.command import own_words
from megatron_tower.config import REPOSITORY, ClusterConfig, Config, InputError
from megatron_tower.runtime import ports, processes, slurm
from megatron_tower.runtime.run_dir import SECRET, write_text

TRAIN, EVALUATE = "megatron_tower.train", "evaluation.run"
RANKED = (TRAIN, EVALUATE, "tools.build_pairs", "tools.filter_prompts")  # commands that the ranks of a layout run together
BAD_INPUT, STOPPED, TERMINATED = 2, 1, 128 + signal.SIGTERM
REFUSED, FAILED_NODES = "refused", "failed_nodes.json"  # that ranks leave in the job's folder
CLOSE = 5.0  # seconds before the time limit from which on SIGTERM means the time limit


@dataclass(frozen=True)
class Job:
    """A module to run as `ranks` tasks, and how to know what became of it."""

    module: str
    words: tuple[str, ...]
    cluster: ClusterConfig
    ranks: int
    folder: Path
    done: Path | None = None  # is there once the work is done; None: exit code 0 says so
    progress: Path | None = None  # its content changes with each checkpoint
    triggers: Path | None = None

    @classmethod
    def of(cls, cfg: Config, module: str, words: list[str]) -> "Job":
        """The job that `python -m module words` makes in Slurm."""
        ranks = cfg.parallel.world_size if module in RANKED and not (module == EVALUATE and cfg.eval.stage == "score") else 1
        folder, done, progress = Path(cfg.run_dir) / "logs", None, None
        if module == TRAIN:
            folder, done, progress = cfg.phase_dir / "logs", cfg.phase_dir / "finished.json", cfg.phase_dir / "checkpoints" / "latest"
        elif module == EVALUATE and (cfg.eval.checkpoint or cfg.eval.output):
            folder = cfg.evaluation_dir / "logs"
        return cls(module, tuple(words), cfg.cluster, ranks, folder.absolute(), done, progress, Path(cfg.run_dir) / "triggers")

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.cluster.ranks_per_node)

    @property
    def tasks_per_node(self) -> int:
        return min(self.ranks, self.cluster.ranks_per_node)

    def run(self) -> int:
        """Run the ranks and wait; returns the exit code of the job. When the job was requeued, ends this process instead."""
        if too_small := self.too_small(slurm.cpus()):
            print(f"error: {too_small}", flush=True)
            return BAD_INPUT
        logs = self.folder / slurm.job_id()
        logs.mkdir(parents=True, exist_ok=True)
        for left in (REFUSED, FAILED_NODES):  # by the start before this one
            (logs / left).unlink(missing_ok=True)
        hosts, end = slurm.nodes(), slurm.end_time(slurm.handle())
        command, environment = self.command(logs), self._environment(logs, hosts, end)
        self._note(logs, command, environment)
        print(f"{self.module} on {','.join(hosts)}: {shlex.join(command)}", flush=True)
        code, terminated = _supervise(command, environment)
        over = terminated and not (end and time.time() > end - CLOSE)
        final, why = self._verdict(logs, code, over)
        if code and final != 0:
            _show(logs, code)
        if final is None:
            final, why = self._requeue(logs, code)
        print(f"{self.module}: {why}", flush=True)
        return final

    def too_small(self, cpus: list[int]) -> str | None:
        """Why the ranks can't be started in a job with `cpus` on its nodes, as one that was submitted by hand: srun would only fail."""
        cluster = self.cluster
        fitting = sum(count >= self.tasks_per_node * cluster.cpus_per_rank for count in cpus)
        if not cpus or fitting >= self.nodes or any(word in ("-O", "--overcommit") for word in cluster.srun):
            return None
        return (
            f"{self.module} takes --nodes={self.nodes} --ntasks-per-node={self.tasks_per_node} --cpus-per-task={cluster.cpus_per_rank} "
            f"(ranks_per_node and cpus_per_rank of cluster={cluster.name}), and this job has {len(cpus)} "
            f"node{'s' if len(cpus) > 1 else ''} of {' and '.join(map(str, sorted(set(cpus))))} CPUs: submit it with these options"
        )

    def _verdict(self, logs: Path, code: int, over: bool) -> tuple[int | None, str]:
        """(the job's exit code, why), None: it is to start again. `over`: Slurm has ended the job before its time."""
        if self.done.exists() if self.done else code == 0 and not over:
            return 0, "done"
        if code == BAD_INPUT or (logs / REFUSED).exists():  # srun tells the highest code: of ranks that it ended for the sake of one
            return BAD_INPUT, "refused its input: mend it and submit again"
        if self.triggers and (self.triggers / "stop").exists():
            return STOPPED, f"{self.triggers / 'stop'} is there: remove it and submit again to go on"
        if over:
            return TERMINATED, "ended by Slurm; submit again to go on, unless Slurm has requeued it itself"
        idle = self._idle_starts(logs)
        if idle > self.cluster.idle_restarts or not self.cluster.idle_restarts:
            return code or STOPPED, f"ended with exit code {code}, and {idle} starts in a row saved nothing new: not requeued"
        return None, ""

    def _requeue(self, logs: Path, code: int) -> tuple[int, str]:
        """Put the job back into the queue, and end this process; returns (exit code, why) where Slurm refuses."""
        failed = json.loads((logs / FAILED_NODES).read_text()) if (logs / FAILED_NODES).exists() else {}
        exclude = sorted(failed) if self.cluster.exclude_failed_nodes else []
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # that a requeue sends, also to this process: it has more to do
        try:
            slurm.requeue(slurm.handle(), exclude)
        except RuntimeError as error:
            signal.signal(signal.SIGTERM, before)
            return code or STOPPED, f"unfinished, and not requeued: {error}"
        without = f", without {', '.join(exclude)}" if exclude else ""
        print(f"{self.module}: unfinished (exit code {code}): requeued{without}", flush=True)
        os._exit(0)  # whoever called us (submitit) must not take this for the end

    def command(self, logs: Path) -> list[str]:
        """The srun that starts the ranks."""
        cluster = self.cluster
        return [
            "srun",
            *(f"--nodes={self.nodes}", f"--ntasks={self.ranks}", f"--ntasks-per-node={self.tasks_per_node}"),
            *(f"--cpus-per-task={cluster.cpus_per_rank}", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered"),
            *(f"--output={logs}/rank_%5t.log", "--open-mode=append"),
            *cluster.srun,
            *self._python(),
            *("-m", self.module),
            *self.words,
        ]

    def _python(self) -> list[str]:
        """The interpreter of the ranks, in its container."""
        container = self.cluster.container
        if container is None:
            return [sys.executable]
        mounts = [f"{REPOSITORY}", *container.mounts]
        if container.runtime == "pyxis":
            both = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
            return [f"--container-image={container.image}", f"--container-mounts={both}", f"--container-workdir={Path.cwd()}", "python"]
        binds = [word for mount in mounts for word in ("--bind", mount)]
        gpu = ["--nv"] if self.cluster.gpus_per_node else []
        return ["apptainer", "exec", *gpu, *binds, "--pwd", f"{Path.cwd()}", container.image, "python"]

    def _environment(self, logs: Path, hosts: list[str], end: float | None) -> dict[str, str]:
        """What ranks find in their environment, besides what the job has."""
        own = {
            "MASTER_ADDR": slurm.address(hosts[0]),
            "MASTER_PORT": str(_port(logs.name)),
            "MEGATRON_TOWER_NODES": ",".join(hosts),
            "MEGATRON_TOWER_JOB": f"{logs}",
            "OMP_NUM_THREADS": str(self.cluster.threads_per_rank or self.cluster.cpus_per_rank),
            "PYTHONFAULTHANDLER": "1",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        if end:
            own["MEGATRON_TOWER_END_TIME"] = f"{end:.0f}"
        return own | self.cluster.environment

    def _note(self, logs: Path, command: list[str], environment: dict[str, str]) -> None:
        """Write down how this start began."""
        restart = slurm.restart()
        seen = sorted((os.environ | environment).items())
        variables = [f"{name}={value}" for name, value in seen if not any(word in name.upper() for word in SECRET)]
        told = [shlex.join(command), slurm.ask("scontrol", "show", "job", slurm.handle()), "\n".join(variables)]
        write_text(logs / f"start_{restart}.txt", "\n\n".join(told) + "\n")
        begun = {"restart": restart, "at": time.time(), "nodes": environment["MEGATRON_TOWER_NODES"], "from": self._saved()}
        with (logs / "starts.jsonl").open("a") as starts:
            starts.write(json.dumps(begun) + "\n")

    def _saved(self) -> str | None:
        """The newest checkpoint."""
        return self.progress.read_text().strip() if self.progress and self.progress.exists() else None

    def _idle_starts(self, logs: Path) -> int:
        """Starts in a row, up to this one, that began at the checkpoint which still is the newest."""
        count, now = 0, self._saved()
        for line in reversed((logs / "starts.jsonl").read_text().splitlines()):
            if json.loads(line)["from"] != now:
                break
            count += 1
        return count


def supervised(cfg: Config, module: str) -> bool:
    """In a Slurm job's first process: run this command's ranks and end with their exit code. False where the caller shall do the work.

    Raises InputError when the cluster is one of Slurm and this process is in no job.
    """
    if cfg.cluster.launcher != "slurm" or slurm.in_step():
        return False
    if slurm.job_id() is None:
        raise InputError(
            f"cluster={cfg.cluster.name} runs in Slurm jobs: python -m megatron_tower.launch submits one, "
            f"as does sbatch slurm/train.sbatch; cluster=local runs here"
        )
    if code := Job.of(cfg, module, own_words()).run():
        sys.exit(code)
    return True


def _supervise(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run `command`; its exit code, and whether this process was told to end meanwhile.

    Slurm signals the ranks itself. To end their step srun is never sent SIGTERM, at which it kills: it passes SIGUSR2 on, and they save.
    """
    terminated = False
    step = processes.start(command, environment)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = terminated or number != signal.SIGUSR2
        if number != signal.SIGTERM and step.poll() is None:
            step.send_signal(signal.SIGUSR2)

    before = {number: signal.signal(number, stop) for number in processes.FORWARDED}
    try:
        code = step.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return processes.exit_code(code), terminated


def _port(job: str) -> int:
    """A free port of this node, where rank 0 will be: jobs of one cluster begin to look one apart, clusters anywhere."""
    return ports.free(zlib.crc32(os.environ.get("SLURM_CLUSTER_NAME", "").encode()) + int(job))


def _show(logs: Path, code: int) -> None:
    """The end of the log that was written last: of a rank that failed, more often than not."""
    written = sorted(logs.glob("rank_*.log"), key=lambda path: path.stat().st_mtime_ns)
    if written:
        print(f"the ranks ended with exit code {code}; the end of {written[-1]}:", *processes.tail(written[-1]), sep="\n  ", flush=True)
