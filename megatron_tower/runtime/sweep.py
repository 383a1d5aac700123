"""Sweeps: every cell of a Hydra multirun is a command line of its own, which runs here or as a Slurm job of the size that it needs.

    python -m evaluation.run -m eval.checkpoint=runs/mine/sft,runs/mine/wpo
    python -m megatron_tower.train -m phase=sft phase.optimizer.lr=1e-6,3e-6 cluster=my_cluster hydra/launcher=submitit_slurm

    <hydra.sweep.dir>/sweep.md, sweep.csv, sweep.png   of all its cells (tools/sweep.py)
                      <number>/cell.json               what the cell is and what became of it (runtime/cells.py)
                      <number>/run/                    its run_dir when it trains; data and start_from stay those of the words' run_dir
                      <number>/evaluation/             its scores, where several cells would write to one <checkpoint>/evaluation

A cell that fails doesn't stop the others. The same command again runs what is missing, also with more values when its words name the
folder by hydra.sweep.dir: a cell is known by its words, those of `cluster` left out. Imports no torch.
"""

import fcntl
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from megatron_tower.command import LAUNCHER, identity, load, refuse
from megatron_tower.config import Config, InputError, check_phase, digest
from megatron_tower.runtime import cells, processes, run_dir, slurm
from megatron_tower.runtime.cells import DONE, FAILED, HERE, QUEUED, RUNNING, SLURM, WHERE, Cell, word
from megatron_tower.runtime.job import EVALUATE, TRAIN, Job

INTERRUPTED = {0, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes of a cell told to end
LOOKS = (2, 2, 3, 5, 10, 20)  # seconds between looks at the queue


class Registration(Callback):
    """Makes the launcher known to Hydra, which calls this first; named in conf/config.yaml."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sys.modules[SweepLauncher.__module__] = sys.modules[__name__]  # Hydra looks for launchers in packages of certain names only
        Plugins.instance().register(SweepLauncher)
        if config.hydra.launcher._target_ != LAUNCHER:
            refuse(InputError(f"hydra/launcher={_choice(config)} runs no sweep here: use submitit_slurm, or leave it out"))


class SweepLauncher(Launcher):
    """Runs the cells that are not done, here or in Slurm, and has the results gathered."""

    __module__ = LAUNCHER.rpartition(".")[0]

    def __init__(self, array_parallelism: int = 1) -> None:
        self.at_once = array_parallelism  # Slurm jobs of one array

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Raises InputError when no cell can run; ends the process with exit code 1 when one has not come to its end."""
        folder, module = Path(self.config.hydra.sweep.dir), sys.modules["__main__"].__spec__.name
        work = plan(folder, module, [list(words) for words in job_overrides], _choice(self.config))
        missing = [(cell, cfg) for cell, cfg in work if cfg]
        print(f"{folder}: {len(work)} cells, {len(missing)} to run", flush=True)
        if _choice(self.config) == SLURM:
            submit(missing, self.at_once)
            wait([cell for cell, _ in work])
        else:
            run_here([cell for cell, _ in missing], cells.swept([cell for cell, _ in work]))
        subprocess.run([sys.executable, "-m", "tools.sweep", str(folder)], check=True)
        if any(Cell.read(cell.folder).state != DONE for cell, _ in work):
            sys.exit(1)
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]


def plan(folder: Path, module: str, swept: list[list[str]], launcher: str) -> list[tuple[Cell, Config | None]]:
    """Each cell with what it is to run: None for one that is done, that is refused, or that is in Slurm's hands.

    Raises InputError, with nothing written, for what is no sweep, or when every cell is refused.
    """
    if module not in (TRAIN, EVALUATE):
        raise InputError(f"python -m {module} takes no -m: sweeps are made of {TRAIN} and {EVALUATE}")
    if doubled := [words for words, count in Counter(map(identity, swept)).items() if count > 1]:
        raise InputError(f"several cells are {' '.join(doubled[0])} and differ in nothing but cluster words: sweep something else")
    checked = _checked(module, swept, launcher)
    if all(isinstance(cfg, InputError) for cfg in checked):
        raise checked[0]
    known = {identity(cell.words): cell for cell in cells.read(folder)}
    if other := next((cell.module for cell in known.values() if cell.module != module), None):
        raise InputError(f"{folder} holds a sweep of {other}: name another folder, as in hydra.sweep.dir=runs/sweeps/mine")
    crowd = Counter(str(_outputs(module, cfg)) for cfg in checked if isinstance(cfg, Config))
    crowd.update(known[own].outputs for own in known.keys() - set(map(identity, swept)))
    queue = cells.alive_jobs(list(known.values()))
    work: list[tuple[Cell, Config | None]] = []
    for words, cfg in zip(swept, checked, strict=True):
        cell = known.get(identity(words)) or Cell(_new(folder), module, words, launcher)
        if cells.is_alive(cell, queue):
            work.append((cell, None))
            continue
        cell.words, cell.launcher = words, launcher
        try:
            if isinstance(cfg, InputError):
                raise cfg
            placed = _placed(cell, cfg, shared=crowd[str(_outputs(module, cfg))] > 1)
            if module == TRAIN:
                run_dir.check(placed)
        except InputError as error:
            cell.note(FAILED, str(error))
            work.append((cell, None))
            continue
        done, cell.config = cell.holds(cfg), digest(cfg, WHERE)
        if not done:
            cell.note_job(None)
            cell.note(QUEUED)
        work.append((cell, None if done else placed))
    return work


def run_here(missing: list[Cell], keys: list[str]) -> None:
    """Run cells, told apart by `keys`, one after the other. A signal is the running cell's to answer; no other begins after it."""
    for number, cell in enumerate(missing, 1):
        with cell.log.open("w") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            cell.note(RUNNING)
            print(f"[{number}/{len(missing)}] {cell.log}  {cell.label(keys)}", flush=True)
            began = time.monotonic()
            child = processes.start(cell.argv, output=log)
            with processes.forwarding([child]):
                code = child.wait()
        cell.end(code, [cell.log])
        print(f"[{number}/{len(missing)}] {cell.reason or DONE}  ({time.monotonic() - began:.0f} s)", flush=True)
        if cell.state == FAILED and code in INTERRUPTED:
            break


@dataclass(frozen=True)
class CellJob:
    """What the first process of a cell's Slurm job calls. It ends with the cell's exit code, so that Slurm knows it too."""

    cell: Cell
    job: Job

    def run(self) -> None:
        self.cell.note(RUNNING)
        code = self.job.run()  # does not return when it has requeued the job: the cell goes on
        logs = (self.job.folder / slurm.job_id()).glob("rank_*.log")
        self.cell.end(code, sorted(logs, key=lambda path: path.stat().st_mtime_ns))
        sys.exit(code)


def submit(missing: list[tuple[Cell, Config]], at_once: int) -> None:
    """Queue the cells: those that ask Slurm for the same are one array."""
    from megatron_tower.runtime.queue import SlurmQueue  # not above: every command line imports this module, and submitit takes its time

    arrays: dict[str, list[CellJob]] = {}
    for cell, cfg in missing:
        job = Job.of(cfg, cell.module, [*cell.words, *cell.own])
        arrays.setdefault(_asked(job), []).append(CellJob(cell, job))
    for array in arrays.values():
        first, sweep = array[0].job, array[0].cell.folder.parent
        executor = SlurmQueue(first.cluster).executor(f"sweep {sweep.name}", replace(first, folder=sweep / ".submitit"), [])
        executor.update_parameters(array_parallelism=at_once)
        for one, queued in zip(array, executor.map_array(CellJob.run, array), strict=True):
            one.cell.note_job(queued.job_id)


def wait(work: list[Cell]) -> None:
    """Return when no cell is in the queue. A job that goes back into the queue is still in it."""
    jobs = {cell.job for cell in work if cell.job and cell.state != DONE}
    if not jobs:
        return
    told = None
    try:
        for pause in chain(LOOKS, repeat(LOOKS[-1])):
            left = _left(jobs)
            if left is not None and len(left) != told:
                told = len(left)
                print(f"{told} of {len(work)} cells are in the queue", flush=True)
            if left is not None and not left:
                return
            time.sleep(pause)
    except KeyboardInterrupt:
        folder = work[0].folder.parent
        print(f"the cells go on; the same command waits for them again, python -m tools.sweep {folder} shows how far they are")
        sys.exit(128 + signal.SIGINT)


def _left(jobs: set[str]) -> set[str] | None:
    """Those of `jobs` that are in the queue; None while slurmctld does not answer, which may be restarting."""
    try:
        return jobs & cells.in_queue()
    except RuntimeError as error:
        print(error, flush=True)
        return None


def _checked(module: str, swept: list[list[str]], launcher: str) -> list[Config | InputError]:
    """What the words of each cell mean, or why they can't be run."""
    verdicts: dict[str, InputError | None] = {}  # on what is asked of Slurm, which is much the same for all cells

    def checked(words: list[str]) -> Config | InputError:
        try:
            cfg = load(words)
            if module == TRAIN:
                check_phase(cfg)
            if cfg.cluster.launcher != ("local" if launcher == HERE else "slurm"):
                mend = "add hydra/launcher=submitit_slurm or use cluster=local" if launcher == HERE else "leave hydra/launcher out"
                raise InputError(f"cluster={cfg.cluster.name} has launcher={cfg.cluster.launcher}: {mend}")
            if launcher == SLURM:
                job = Job.of(cfg, module, words)
                if _asked(job) not in verdicts:
                    verdicts[_asked(job)] = _verdict(job)
                if refusal := verdicts[_asked(job)]:
                    raise refusal
        except InputError as error:
            return error
        return cfg

    return [checked(words) for words in swept]


def _asked(job: Job) -> str:
    """What tells the jobs of one array from those of another."""
    return f"{job.nodes} {job.ranks} {job.cluster}"


def _verdict(job: Job) -> InputError | None:
    from megatron_tower.runtime.queue import SlurmQueue

    try:
        SlurmQueue(job.cluster).check([job])
    except InputError as error:
        return error
    return None


def _outputs(module: str, cfg: Config) -> Path:
    """Where a command writes."""
    return cfg.phase_dir if module == TRAIN else cfg.evaluation_dir


def _placed(cell: Cell, cfg: Config, shared: bool) -> Config:
    """`cfg` with the cell's own outputs, which are noted in the cell with the words for them."""
    if cell.module == TRAIN:
        inputs = {"data.folder": cfg.data.folder, "data.cache": cfg.data.cache}
        inputs |= {"phase.start_from": cfg.phase.start_from, "phase.file": cfg.phase.file}
        cfg = replace(cfg, run_dir=str(cell.folder / "run"))
        cell.own = [word("run_dir", cfg.run_dir), *(word(key, path) for key, path in inputs.items())]
    elif shared or cell.own:
        cfg = replace(cfg, eval=replace(cfg.eval, output=str(cell.folder / "evaluation")))
        cell.own = [word("eval.output", cfg.eval.output)]
    cell.outputs = str(_outputs(cell.module, cfg))
    return cfg


def _new(folder: Path) -> Path:
    """A folder for one more cell."""
    taken = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    path = folder / str(max(taken, default=-1) + 1)
    path.mkdir(parents=True)
    return path


def _choice(config: DictConfig) -> str:
    return config.hydra.runtime.choices["hydra/launcher"]
