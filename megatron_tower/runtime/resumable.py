"""A large folder that is written file by file and survives a kill: what was finished is kept by the next try.

    produce(Plan(output, key, units, finish))

While it is written the folder is called `<output>.partial`. A file there has its final name only when it is whole and on the disk;
its facts (what `fill` said of it) lie in `.done/` before that. `.plan.json` holds the plan's key: work begun on another source or with
other settings is refused, never mixed. At the end the folder gets its name in one stroke.
Leaves out: several machines writing one folder (a second process is refused).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_tower.config import InputError
from megatron_tower.runtime.run_dir import is_full, nearest, write_text

PLAN, DONE = ".plan.json", ".done"
BLOCK = 1 << 18  # bytes written at once: 1 MiB took the kernel four times the CPU time on ext4, 16 MiB ten times
MARGIN = 1.01  # of the tensors' bytes, for headers and small files
LINE_EVERY = 10.0  # seconds between plain lines


class Sink:
    """A file being written; `told` hears of every byte."""

    def __init__(self, path: Path, told: Callable[[int], None]):
        self.path, self.size, self._told = path, 0, told
        self._file = path.open("wb", buffering=1 << 15)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._file.write(block)
            self._told(len(block))
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        """Return when all is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Changed(InputError):
    """A file of the source is not what its checksum says."""


@dataclass(frozen=True)
class Unit:
    """Files that are written in one pass over what goes into them.

    files: name in the folder -> bytes of tensors.   fill: writes to one sink a file and returns facts of each, which JSON can hold.
    """

    files: dict[str, int]
    fill: Callable[[list[Sink]], list[dict]]


@dataclass(frozen=True)
class Plan:
    """key: what decides the content.   sums: sha256 that files of the source must turn out to have.

    finish: writes the small files, given the folder so far and the facts by file name.
    """

    output: Path
    key: dict[str, str | int | None]
    units: list[Unit]
    finish: Callable[[Path, dict[str, dict]], None]
    sums: dict[Path, str] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")


def describe(plan: Plan) -> None:
    """Print what `produce` would write, and what room it needs. InputError when something else is in its place."""
    if _is_there(plan):
        return
    for unit in plan.units:
        for name, size in unit.files.items():
            print(f"{size / 1e9:10.3f} GB  {name}{'  (finished)' if _finished(plan.partial, name) else ''}")
    needed, free, disk = _room(plan)
    print(f"{needed / 1e9:10.3f} GB  to write; {disk} has {free / 1e9:,.3f} GB free")


def produce(plan: Plan) -> None:
    """Write the folder, or what a killed try has left of it to write.

    Raises InputError when something else is in its place, the disk is too small, or a file of the source is not what it should be.
    """
    if _is_there(plan):
        shutil.rmtree(plan.output / DONE, ignore_errors=True)  # left by a kill at the very end
        return
    needed, free, disk = _room(plan)
    if needed > free:
        raise InputError(
            f"{plan.output} takes {needed:,} bytes more and {disk} has {free:,} free: free some space or choose an output on another disk"
        )
    with _claimed(plan) as partial:
        try:
            facts = _write(plan, partial)
            plan.finish(partial, facts)
        except Changed:
            shutil.rmtree(partial, ignore_errors=True)  # made from bytes that can't be trusted; on NFS the open lock stays
            raise
        except OSError as error:
            if not is_full(error):
                raise
            raise InputError(f"the disk of {partial} is full: free some space and run again, finished files are kept") from error
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if plan.output.exists():
            plan.output.rmdir()
        partial.rename(plan.output)
        sync(plan.output.parent)
    shutil.rmtree(plan.output / DONE)


def sync(path: Path) -> None:
    """Return when what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write(plan: Plan, partial: Path) -> dict[str, dict]:
    """All units; facts by file name. The source's files are hashed meanwhile, while they are in memory anyway."""
    left = [unit for unit in plan.units if not all(_finished(partial, name) for name in unit.files)]
    hashing, publishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    sums = {file: hashing.submit(_sha256, file) for file in plan.sums}
    published: list[Future] = []
    try:
        with _progress(plan.output.name, sum(size for unit in left for size in unit.files.values())) as told:
            for unit in left:
                sinks = [Sink(_aside(partial, name), told) for name in unit.files]
                facts = unit.fill(sinks)
                published.append(publishing.submit(_publish, partial, dict(zip(unit.files, sinks, strict=True)), facts))
                _raise(plan, {file: sum for file, sum in sums.items() if sum.done()}, [one for one in published if one.done()])
            _raise(plan, {}, published)
        _raise(plan, sums, [])
    finally:
        hashing.shutdown(cancel_futures=True)
        publishing.shutdown()
    return {name: json.loads(_facts(partial, name).read_text()) for unit in plan.units for name in unit.files}


def _publish(partial: Path, sinks: dict[str, Sink], facts: list[dict]) -> None:
    """Give files their names: bytes on the disk first, then the facts, then the name."""
    for (name, sink), said in zip(sinks.items(), facts, strict=True):
        sink.close()
        _facts(partial, name).parent.mkdir(parents=True, exist_ok=True)
        write_text(_facts(partial, name), json.dumps({"bytes": sink.size} | said))
        sink.path.rename(partial / name)


def _raise(plan: Plan, sums: dict[Path, Future], published: list[Future]) -> None:
    """What went wrong in the threads."""
    for publication in published:
        publication.result()
    for file, found in sums.items():
        if found.result() != plan.sums[file]:
            raise Changed(f"{file} was changed or damaged on its way (its sha256 is not the one stated): get it again")


def _finished(partial: Path, name: str) -> bool:
    return (partial / name).is_file()


def _facts(partial: Path, name: str) -> Path:
    return partial / DONE / f"{name}.json"


def _aside(partial: Path, name: str) -> Path:
    path = partial / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.part")


@contextmanager
def _claimed(plan: Plan) -> Iterator[Path]:
    """The partial folder, this process's alone; InputError when another is at it or other work was begun there."""
    partial = plan.partial
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{partial} cannot be made ({error.strerror}): choose another output") from error
    stored = _stored_key(partial)
    if stored is None and any(path.suffix != ".part" and path.name != DONE for path in partial.iterdir()):
        raise InputError(f"{partial} holds files that were not begun here: remove it")
    (partial / DONE).mkdir(exist_ok=True)
    with (partial / DONE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is writing {partial}: wait for it") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system may have no locks
                raise
        if stored not in (None, plan.key):
            changed = [f"{key}: {stored.get(key)} -> {value}" for key, value in plan.key.items() if stored.get(key) != value]
            raise InputError(f"{partial} was begun with another plan ({', '.join(changed)}): remove it, or go back to that plan")
        write_text(partial / PLAN, json.dumps(plan.key, indent=1) + "\n")
        yield partial


def _is_there(plan: Plan) -> bool:
    """Whether the output is whole already; InputError when something else is."""
    if not plan.output.exists() or (plan.output.is_dir() and not any(plan.output.iterdir())):
        return False
    if _stored_key(plan.output) != plan.key:
        raise InputError(f"{plan.output} holds other files already: remove it or choose another output")
    print(f"{plan.output} is there already")
    return True


def _stored_key(folder: Path) -> dict | None:
    file = folder / PLAN
    return json.loads(file.read_text()) if file.is_file() else None


def _room(plan: Plan) -> tuple[int, int, Path]:
    """Bytes that are still to write, bytes free, and where."""
    left = sum(size for unit in plan.units for name, size in unit.files.items() if not _finished(plan.partial, name))
    disk = nearest(plan.output.parent)
    return int(left * MARGIN), shutil.disk_usage(disk).free, disk


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """How far the writing is: a bar in a terminal, else a plain line every ten seconds. Call what it yields with bytes written."""
    if Console().is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.update(task, advance=count)
        return
    started = last = time.monotonic()
    done = 0

    def line(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            speed = done / (now - started)
            left = max(0.0, total - done) / speed
            print(f"{name}  {done / 1e9:,.1f} of {total / 1e9:,.1f} GB  {speed / 1e9:.2f} GB/s  {left / 60:.1f} min left", flush=True)

    yield line
    print(f"{name}  {done / 1e9:,.3f} GB in {time.monotonic() - started:.1f} s", flush=True)
