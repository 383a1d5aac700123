"""One rank's file of a checkpoint: written and hashed here, or by a process beside the training.

The process is forked: its memory is that of the moment, whatever training does meanwhile. It touches no device (tensors come from host
memory), dies with its parent, and tells what it wrote; whether that ever becomes a checkpoint is for the ranks to decide together
(`training/saving.py`).
"""

import gc
import multiprocessing
import os
import queue
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_tower.runtime import processes
from megatron_tower.runtime.stop import STOPPING
from megatron_tower.training.checkpoint import file_facts


@dataclass(frozen=True)
class Written:
    """`places`: where each tensor lies, as megatron-core's writer notes it, by file; `files`: name -> {bytes, sha256}."""

    places: dict[int, list] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)


def write(buckets: list[WriteBucket]) -> Written | str:
    """Write tensors of host memory to their files, down to the disk. Returns the error when that fails: all ranks must learn of it."""
    written = Written()
    try:
        for number, bucket in enumerate(buckets):
            told, running = queue.Queue(), queue.Queue()
            running.put(number)
            FileSystemWriterAsync.write_preloaded_data([_StorageWriterTransforms()], number, bucket, told, running, use_fsync=True)
            _, places = told.get()
            if isinstance(places, Exception):
                raise places
            path, name, _ = bucket
            written.places[number] = places
            written.files[name] = file_facts(Path(path))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return written


class Writer:
    """`write` in a process beside the training."""

    def __init__(self, buckets: list[WriteBucket]):
        context = multiprocessing.get_context("fork")
        self._told, tell = context.Pipe(duplex=False)
        self._buckets = buckets  # pinned host memory may be shared with the process: it must not be used again while that reads it
        self._process = context.Process(target=_write_beside, args=(os.getpid(), tell, buckets), daemon=True)
        self._process.start()
        tell.close()

    def outcome(self) -> Written | str | None:
        """What it wrote, or why it failed; None while it is writing."""
        if not self._told.poll():
            return None
        try:
            return self._told.recv()
        except EOFError:  # it is gone: only it had the other end of the pipe
            self._process.join()
            return f"the writing process ended with code {self._process.exitcode} and without a word"

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.join()


def _write_beside(parent: int, tell: Connection, buckets: list[WriteBucket]) -> None:
    gc.disable()  # what it would free belongs to the parent, on a device that this process must not touch
    for number in STOPPING:  # a job's signal reaches all its processes: the parent waits for this one, then ends
        signal.signal(number, signal.SIG_IGN)
    processes.die_with_parent()
    if os.getppid() != parent:  # it died before it could be asked to take this process along
        os._exit(1)
    tell.send(write(buckets))
