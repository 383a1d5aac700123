"""Checkpoints out of training: written aside, checksummed, then made visible in one stroke.

    begin     every rank has its tensors in host memory, and a folder of this save's own, which no reader looks at
    write     each rank its file: here, or, with `phase.async_save`, in a process beside the training (`training/writer.py`)
    publish   when all ranks' files are whole: the manifest, the name, `latest`; then what retention lets go is removed

A save that dies on the way leaves its own folder, which the next one removes. `phase.keep_last` checkpoints stay, and of each
`phase.keep_every` steps the first. Leaves out: reading back (`training/loading.py`), what lies on disk (`training/checkpoint.py`).
"""

import json
import math
import os
import queue
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_tower.config import Config, InputError, PhaseConfig
from megatron_tower.data import manifest as data_manifest
from megatron_tower.data.manifest import digest
from megatron_tower.runtime.distributed import device, gathered, is_rank_zero, place
from megatron_tower.runtime.run_dir import write_text
from megatron_tower.training.checkpoint import LATEST, MANIFEST
from megatron_tower.training.state import TrainingState, bytes_per_weight, sharded_model, sharded_state
from megatron_tower.training.writer import Writer, Written, facts, write

MARGIN = 1.05  # of the tensors' bytes, for headers and metadata
PAUSE = 0.01  # seconds between two looks at the writers, where there is nothing to do but wait for them


@dataclass(frozen=True)
class Draft:
    """A checkpoint on its way: in `aside`, of which the manifest will say `told`. `request` is how megatron-core ends what it began."""

    aside: Path
    told: dict
    buckets: list[WriteBucket]
    request: AsyncRequest


class Saver:
    """Saves a phase's checkpoints; leaving its context waits for the last one, or gives it up after an error. Every rank must call it."""

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._draft: Draft | None = None  # that a writer is at
        self._writer: Writer | None = None
        self._outcome: Written | str | None = None

    def save(self, state: TrainingState) -> None:
        """Save `state` as it is now, and return when it is published or, with `phase.async_save`, when training may change it."""
        if not self._cfg.phase.async_save:
            save(self._cfg, state)
            return
        self.wait()
        self._draft = begin(self._cfg, state)
        self._writer = Writer(self._draft.buckets)

    def poll(self) -> None:
        """Publish the checkpoint under way if it is written; raise RuntimeError if that failed on any rank."""
        if self._draft is None:
            return
        self._outcome = self._outcome or self._writer.outcome()
        unfinished = torch.tensor(int(self._outcome is None), device=device())
        dist.all_reduce(unfinished)
        if not unfinished:
            draft, outcome = self._draft, self._outcome
            self._draft = self._writer = self._outcome = None
            publish(self._cfg, draft, outcome)

    def wait(self) -> None:
        """Until what is under way is published."""
        while self._draft is not None:
            self.poll()
            time.sleep(PAUSE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._writer is not None:
            self._writer.kill()


def save(cfg: Config, state: TrainingState) -> None:
    """Write `state` as the phase's newest checkpoint; every rank must call it.

    Raises InputError, before anything is written, when the disk has too little space; RuntimeError when writing fails.
    """
    draft = begin(cfg, state)
    publish(cfg, draft, write(draft.buckets))


def begin(cfg: Config, state: TrainingState) -> Draft:
    """Tensors in host memory (on a CPU: the very tensors that train) and a folder to write them to; every rank must call it."""
    make_room(cfg.phase_dir, state)
    aside = cfg.phase_dir / "checkpoints" / f".step_{state.step:08d}.{secrets.token_hex(4)}.part"
    told = {"step": state.step, "samples": state.samples, "tokens": state.tokens, "model": asdict(cfg.model)}
    told |= {"layout": asdict(cfg.parallel), "precision": cfg.precision.params, "optimizer": state.optimizer is not None}
    told["data"] = digest(data_manifest.read(Path(cfg.data.folder)))  # on every rank: where it is gone, all stop
    if is_rank_zero():
        aside.mkdir(parents=True)
    aside = gathered({"aside": aside} if is_rank_zero() else {})["aside"]
    filesystem_async._results_queue = queue.Queue()  # results come from here: no need for megatron-core's server process (line 54)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    request = dist_checkpointing.save(sharded_state(state, loading=False), str(aside), strategy, async_sharded_save=True)
    return Draft(aside, told, request.preload_fn() if request.preload_fn else [], request)


def publish(cfg: Config, draft: Draft, outcome: Written | str) -> None:
    """Make a draft the newest checkpoint, if every rank has written its part; RuntimeError, on every rank, names those that have not."""
    failed = gathered({place().rank: outcome} if isinstance(outcome, str) else {})
    if failed:
        if is_rank_zero():
            shutil.rmtree(draft.aside)
        reasons = "; ".join(f"rank {rank}: {why}" for rank, why in sorted(failed.items()))
        raise RuntimeError(f"step {draft.told['step']} could not be saved ({reasons}): mend that; the same command goes on from {LATEST}")
    if draft.buckets:
        filesystem_async._results_queue.put(outcome.places)
    for finish in draft.request.finalize_fns:  # `.metadata`, from all ranks' places, and metadata.json
        finish()
    files = gathered(outcome.files)
    folder = draft.aside.parent
    final = folder / f"step_{draft.told['step']:08d}"
    if is_rank_zero():
        files |= {path.name: facts(path) for path in draft.aside.iterdir() if path.name not in files}
        told = draft.told | {"files": dict(sorted(files.items()))}
        write_text(draft.aside / MANIFEST, json.dumps(told | {"sha256": digest(told)}, indent=1))
        for path in (*draft.aside.iterdir(), draft.aside):
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        draft.aside.rename(final)
        _fsync(folder)
        write_text(folder / LATEST, final.name + "\n")
        _fsync(folder)
        for path in superseded(folder, cfg.phase):
            shutil.rmtree(path)
    dist.barrier()


def superseded(folder: Path, phase: PhaseConfig) -> list[Path]:
    """Checkpoints in `folder` that may go. Those later than `latest`, of a run that was cut off or turned back, it will write again."""
    newest = (folder / LATEST).read_text().strip()
    steps = {path: int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*")) if path.name <= newest}
    first: dict[int, Path] = {}
    for path, step in steps.items():
        if phase.keep_every and step >= phase.keep_every:
            first.setdefault(step // phase.keep_every, path)
    return [path for path in list(steps)[: -phase.keep_last] if path not in first.values()]


def make_room(phase_dir: Path, state: TrainingState) -> None:
    """Remove what a killed save has left, then raise InputError if a checkpoint of `state` does not fit; every rank must call it."""
    own = (t.data for t in nested_values(sharded_model(state.chunks)) if is_main_replica(t.replica_id))
    size = torch.tensor(sum(weight.numel() * bytes_per_weight(weight) for weight in own), device=device())
    dist.all_reduce(size)
    needed = math.ceil(int(size) * MARGIN)
    existing = next(p for p in (phase_dir, *phase_dir.absolute().parents) if p.exists())
    if is_rank_zero():
        for left in phase_dir.glob("checkpoints/.step_*.part"):
            shutil.rmtree(left)
    free = gathered({place().rank: shutil.disk_usage(existing).free})[0]
    if free < needed:
        raise InputError(
            f"a checkpoint of this model takes {needed:,} bytes and {existing} has {free:,} free: "
            "free some space or choose a run_dir on another disk"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
