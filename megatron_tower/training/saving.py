"""Checkpoints out of training: written aside, checksummed, then made visible in one stroke.

    begin     every rank has its tensors in host memory, and a folder of this save's own, which no reader looks at
    write     each rank its file: here, or, with `phase.async_save`, in a process beside the training (`training/writer.py`)
    publish   when all ranks' files are whole: the manifest, the name, `latest`; then what retention lets go is removed

How long each took stands in <phase>/saves.jsonl. A save that dies on the way leaves its own folder, which the next one removes.
`phase.keep_last` checkpoints stay, and of each `phase.keep_every` steps the first. Leaves out: reading back (`training/loading.py`), what
lies on disk (`training/checkpoint.py`).
"""

import contextlib
import errno
import json
import math
import queue
import secrets
import shutil
import subprocess
import sys
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

from megatron_tower.command import own_words
from megatron_tower.config import Config, InputError, PhaseConfig
from megatron_tower.data import manifest as data_manifest
from megatron_tower.data.manifest import digest
from megatron_tower.runtime.distributed import device, gathered, is_rank_zero, place
from megatron_tower.runtime.resumable import sync
from megatron_tower.runtime.run_dir import nearest, write_text
from megatron_tower.training.checkpoint import LATEST, file_facts, write_manifest
from megatron_tower.training.state import TrainingState, bytes_per_weight, sharded_model, sharded_state
from megatron_tower.training.writer import Writer, Written, write

MARGIN = 1.05  # of the tensors' bytes, for headers and metadata
SUBMITTING = 30.0  # seconds, at most, that the end of training waits for evaluations that are being submitted
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
        self._began = 0.0
        self._submitting: list[subprocess.Popen] = []
        self._told = cfg.phase_dir / "saves.jsonl"
        self.longest = _longest(self._told)  # seconds from a save's beginning until it was published

    def save(self, state: TrainingState) -> None:
        """Save `state` as it is now, and return when it is published or, with `phase.async_save`, when training may change it."""
        if not self._cfg.phase.async_save:
            self._began = time.monotonic()
            save(self._cfg, state)
            self._tell(state.step)
            return
        self.wait()
        self._began = time.monotonic()
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
            self._tell(draft.told["step"])

    def wait(self) -> None:
        """Until what is under way is published."""
        while self._draft is not None:
            self.poll()
            time.sleep(PAUSE)

    def _tell(self, step: int) -> None:
        """Note how long the save of `step` took, also for runs that go on from it."""
        seconds = time.monotonic() - self._began
        self.longest = max(self.longest, seconds)
        if is_rank_zero():
            before = self._told.read_text() if self._told.exists() else ""
            write_text(self._told, before + json.dumps({"step": step, "seconds": round(seconds, 3)}) + "\n")
            every = self._cfg.phase.evaluate_every
            if every and step and step % every == 0:
                self._submitting.append(evaluate(self._cfg, step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._writer is not None:
            self._writer.kill()
        for process in self._submitting:  # whatever a job's ranks have started, Slurm ends with them
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SUBMITTING)


def evaluate(cfg: Config, step: int) -> subprocess.Popen:
    """Have the checkpoint of `step` scored into <phase>/evaluation_<step>, without waiting: a process of its own submits the job.

    What it prints, also why it could not submit, is in <phase>/logs/evaluation_<step>.log.
    """
    name = f"step_{step:08d}"
    output, log = cfg.phase_dir / f"evaluation_{name}", cfg.phase_dir / "logs" / f"evaluation_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [*own_words(), *cfg.phase.evaluate_words, f"eval.checkpoint={cfg.phase_dir / 'checkpoints' / name}", f"eval.output={output}"]
    with log.open("w") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_tower.launch", *words],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def save(cfg: Config, state: TrainingState) -> None:
    """Write `state` as the phase's newest checkpoint; every rank must call it.

    Raises OSError, before anything is written, when the disk has too little space; RuntimeError when writing fails.
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
        files |= {path.name: file_facts(path) for path in draft.aside.iterdir() if path.name not in files}
        write_manifest(draft.aside, draft.told, files)
        for path in (*draft.aside.iterdir(), draft.aside):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        draft.aside.rename(final)
        sync(folder)
        write_text(folder / LATEST, final.name + "\n")
        sync(folder)
        for path in superseded(folder, cfg.phase):
            shutil.rmtree(path)
    dist.barrier()


def _longest(told: Path) -> float:
    """Seconds of the longest save so far."""
    lines = told.read_text().splitlines() if told.exists() else []
    return max((json.loads(line)["seconds"] for line in lines), default=0.0)


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
    """Remove what a killed save has left, then see whether a checkpoint of `state` fits; every rank must call it.

    Raises InputError when it does not and nothing is trained yet; OSError later on: there was room once, another start may find some.
    """
    own = (t.data for t in nested_values(sharded_model(state.chunks)) if is_main_replica(t.replica_id))
    size = torch.tensor(sum(weight.numel() * bytes_per_weight(weight) for weight in own), device=device())
    dist.all_reduce(size)
    needed = math.ceil(int(size) * MARGIN)
    existing = nearest(phase_dir)
    if is_rank_zero():
        for left in phase_dir.glob("checkpoints/.step_*.part"):
            shutil.rmtree(left)
    free = gathered({place().rank: shutil.disk_usage(existing).free})[0]
    if free < needed:
        said = f"a checkpoint takes {needed:,} bytes and {existing} has {free:,} free: free some space or choose a run_dir on another disk"
        raise OSError(errno.ENOSPC, f"step {state.step} can't be saved: {said}") if state.step else InputError(said)
