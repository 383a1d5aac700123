"""Stages over shards: every task of a stage writes one folder, whole and once; a rerun does what is missing.

    <work>/<stage>-<key>/<task>/{what the stage writes, facts.json}

`key` is a digest of all that the stage's output depends on, so a changed setting makes a new folder of the stages that it touches
and of those after them, and leaves the others. A task is called by its number, or by a digest of what it alone depends on. Tasks
run as processes here (`run`), or are shared by the tasks of a Slurm array (`share`). A worker that dies takes its own task with it: the
others go on, and the next run does that task again.
Leaves out: what a stage does; removing the folders of settings that nobody asks for any more.
"""

import multiprocessing
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_tower.config import InputError
from megatron_tower.runtime.run_dir import is_full, write_text

Facts = dict[str, Any]
FACTS = "facts.json"
EVERY = 30  # seconds between lines of progress where no terminal shows a bar


@dataclass(frozen=True)
class Stage:
    """tasks: what each is of, for people: a file, a shard. work(task, folder): writes into `folder`, returns facts, counts that add up.

    called: names of the tasks' folders, their numbers if none are given. prepare: makes what all tasks read and none changes, once, before
    they are forked. gpus: that a task needs.
    """

    name: str
    root: Path  # <work>/<name>-<key>
    tasks: Sequence[str]
    work: Callable[[int, Path], Facts]
    prepare: Callable[[], None] = lambda: None
    gpus: int = 0
    after: tuple["Stage", ...] = field(default=(), repr=False)
    called: Sequence[str] = ()

    def folder(self, task: int) -> Path:
        """What a finished task has left."""
        return self.root / (self.called[task] if self.called else f"{task:05d}")

    def missing(self) -> list[int]:
        done = {entry.name for entry in os.scandir(self.root)} if self.root.is_dir() else set()
        return [task for task in range(len(self.tasks)) if self.folder(task).name not in done]

    def facts(self) -> list[Facts]:
        """Of each task, in order; raises InputError where one is missing."""
        if missing := self.missing():
            raise InputError(
                f"{self.root} lacks {len(missing)} of {len(self.tasks)} tasks ({self.tasks[missing[0]]}): run {self.name} again"
            )
        return [orjson.loads((self.folder(task) / FACTS).read_bytes()) for task in range(len(self.tasks))]


def part(stage: Stage, index: int, count: int) -> list[int]:
    """The missing tasks of the `index`-th of `count` workers, the same whatever the others have done."""
    return [task for task in stage.missing() if task % count == index]


def run(stage: Stage, workers: int, tasks: Sequence[int] | None = None) -> None:
    """Do the missing tasks, or those given, `workers` at a time (0: one a core).

    Raises InputError, once all others have ended, that names the first that failed and why.
    """
    for before in stage.after:
        before.facts()
    todo = stage.missing() if tasks is None else list(tasks)
    if not todo:
        return
    stage.root.mkdir(parents=True, exist_ok=True)
    stage.prepare()
    failed = _processes(stage, todo, min(workers or os.cpu_count() or 1, len(todo)))
    if failed:
        task, why = min(failed.items())
        raise InputError(f"{stage.name}: {len(failed)} of {len(todo)} tasks failed, the first is {stage.tasks[task]}: {why}")


def share(stage: Stage, workers: int, index: int, count: int, patience: float) -> None:
    """Do the missing tasks of one of `count` workers, then wait for the others': what they have not begun to finish is done here, too,
    once nothing new was published for `patience` seconds. Raises InputError as `run` does."""
    run(stage, workers, part(stage, index, count))
    left, since = stage.missing(), time.monotonic()
    while left:
        time.sleep(min(1.0, patience))
        if (now := stage.missing()) != left:
            left, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            run(stage, workers)


def total(facts: Sequence[Facts]) -> Facts:
    """Counts added up, dictionaries key by key, lists joined; anything else must be the same everywhere."""
    result: Facts = {}
    for one in facts:
        for name, value in one.items():
            result[name] = _add(result[name], value) if name in result else value
    return result


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return dict(sorted(total([left, right]).items()))
    if isinstance(left, int | float | list) and not isinstance(left, bool):
        return left + right
    if left != right:
        raise ValueError(f"{left!r} and {right!r} do not add up")
    return left


def _processes(stage: Stage, todo: list[int], workers: int) -> dict[int, str]:
    """Fork a process a task, `workers` at a time; returns why tasks failed."""
    fork = multiprocessing.get_context("fork")  # shares what prepare() made
    waiting, running, failed = list(reversed(todo)), {}, {}
    with _Progress(stage.name, len(todo)) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.pop()
                    ours, theirs = fork.Pipe(duplex=False)
                    process = fork.Process(target=_do, args=(stage, task, theirs), name=f"{stage.name}-{task}")
                    process.start()
                    theirs.close()
                    running[process.sentinel] = (process, task, ours)
                for sentinel in connection.wait(list(running), timeout=EVERY):
                    process, task, ours = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        failed[task] = _why(process.exitcode, ours)
                    ours.close()
                    progress.advance()
                progress.tell()
        finally:
            for process, *_ in running.values():  # after a Ctrl-C: what they wrote was not published
                process.kill()
                process.join()
    return failed


def _why(code: int, ours: connection.Connection) -> str:
    try:
        return ours.recv()
    except EOFError:  # it had no time to say why
        return f"its process was ended by signal {-code}: run the same command again"


def _do(stage: Stage, task: int, tell: connection.Connection) -> None:
    """One task, in a process of its own, which ends here: not by the exit handlers that it has from its parent."""
    name = stage.folder(task).name
    partial = stage.root / f".{name}-{socket.gethostname()}-{os.getpid()}"
    log = stage.root / f"{name}.traceback"
    why = ""
    try:
        partial.mkdir()
        facts = stage.work(task, partial)
        (partial / FACTS).write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        _publish(partial, stage.folder(task))
        log.unlink(missing_ok=True)
        for left in stage.root.glob(f".{name}-*"):  # of workers that were killed
            shutil.rmtree(left, ignore_errors=True)
    except InputError as error:
        why = str(error)
    except BaseException as error:
        if stage.folder(task).is_dir():  # another worker was first, and has cleared away what this one had begun
            shutil.rmtree(partial, ignore_errors=True)
        elif is_full(error):
            why = f"the disk of {stage.root} is full: free space and run the same command again"
        elif isinstance(error, OSError):
            why = repr(error)
        else:
            why = f"{error!r}, see {log}"
            write_text(log, traceback.format_exc())
    if why:
        shutil.rmtree(partial, ignore_errors=True)
        tell.send(why)
    os._exit(1 if why else 0)


def _publish(partial: Path, final: Path) -> None:
    """Everything on the disk, then one rename; where another worker was first, its folder stays."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():
            raise


class _Progress:
    """A bar on a terminal, drawn by no thread of its own, which a fork would not survive; elsewhere a line at times."""

    def __init__(self, name: str, tasks: int) -> None:
        self.name, self.tasks, self.done, self.told = name, tasks, 0, time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        if self.bar:
            self.bar.start()
            self.bar.add_task(self.name, total=self.tasks)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        self.done += 1
        if self.bar:
            self.bar.advance(self.bar.task_ids[0])
            self.bar.refresh()

    def tell(self) -> None:
        if not self.bar and time.monotonic() - self.told > EVERY:
            print(f"{self.name}: {self.done} of {self.tasks} tasks", flush=True)
            self.told = time.monotonic()
