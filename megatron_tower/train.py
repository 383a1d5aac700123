"""Train one phase.

    python -m megatron_tower.train phase=cpt model=tiny_gemma2 run_dir=runs/mine phase.seq_length=256
    python -m megatron_tower.train phase=sft model=tiny_gemma2 run_dir=runs/mine phase.seq_length=256 parallel=tp2   # starts its two ranks

The same command goes on where an interrupted run stopped. SIGTERM, SIGUSR2 and Ctrl-C save a checkpoint and end with exit code 0; a phase
is done when its directory holds finished.json. In a Slurm job the ranks are tasks of one srun (`runtime/job.py`). Leaves out: several
phases in a row (`megatron_tower.recipe`), submitting (`megatron_tower.launch`).
"""

import contextlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.command import entry_point
from megatron_tower.config import Config, check_phase
from megatron_tower.runtime import run_dir
from megatron_tower.runtime.job import TRAIN, supervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_tower.models.build import Decoder
    from megatron_tower.training.checkpoint import Checkpoint
    from megatron_tower.training.rounds import Source
    from megatron_tower.training.trainer import Trainer


@entry_point
def main(cfg: Config) -> None:
    check_phase(cfg)
    run_dir.check(cfg)
    if run_dir.is_finished(cfg.phase_dir):
        print(f"{cfg.phase_dir} is finished")
        return
    if supervised(cfg, TRAIN):
        return
    from megatron_tower.runtime import cpu, distributed
    from megatron_tower.runtime.local import is_rank, relaunch_if_needed

    cpu.install()
    if distributed.place().world_size > 1:  # first of all, so that a node that is missing or lacks something is named as such
        distributed.join(cfg.cluster, (Path(cfg.run_dir).parent, Path(cfg.phase.start_from)))
    with run_dir.claimed(cfg.phase_dir) if distributed.is_rank_zero() else contextlib.nullcontext():
        run_dir.check(cfg)  # once more: another process may have begun or ended it before we had it
        start = check_inputs(cfg)
        if is_rank(cfg):
            train(cfg, start)
            return
    relaunch_if_needed(cfg, TRAIN)


def check_inputs(cfg: Config) -> "Path | Checkpoint":
    """Where the weights come from: the phase's own checkpoint, else `phase.start_from`. InputError when anything is missing or broken."""
    from megatron_tower.data import manifest
    from megatron_tower.runtime import distributed, progress
    from megatron_tower.training import checkpoint

    progress.check(cfg)
    if distributed.is_rank_zero():
        manifest.verify(Path(cfg.data.folder))
    start = checkpoint.latest(cfg.phase_dir) or _start_from(cfg)
    if isinstance(start, checkpoint.Checkpoint):
        checkpoint.same_architecture(start, cfg.model)
        if cfg.parallel.world_size > distributed.place().world_size:  # ranks are started next, and write logs: find out before
            checkpoint.verify(start.path)
    return start


def train(cfg: Config, start: "Path | Checkpoint") -> None:
    """Train the phase from `start`, as one of its `parallel.world_size` ranks."""
    from megatron_tower.data import manifest
    from megatron_tower.models import kernels
    from megatron_tower.runtime import distributed, watchdog
    from megatron_tower.runtime.stop import StopSignal

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster, (Path(cfg.run_dir).parent,))
    stop = StopSignal(Path(cfg.run_dir) / "triggers")
    if end := stop.agreed().end:
        distributed.shutdown()
        if distributed.is_rank_zero():
            print(f"{end}: {cfg.phase.name} did not begin", flush=True)
        return
    watchdog.arm(cfg.cluster.hang_seconds)
    trainer = build(cfg, start)
    if distributed.is_rank_zero():
        run_dir.open_phase(cfg, trainer.state.step)
        shutil.copytree(Path(cfg.data.folder) / "tokenizer", cfg.phase_dir / "tokenizer", dirs_exist_ok=True)
        shutil.copyfile(Path(cfg.data.folder) / manifest.NAME, cfg.phase_dir / run_dir.DATA)
        print(f"{cfg.phase.name}: steps {trainer.state.step + 1} to {trainer.steps}, from {getattr(start, 'path', start)}", flush=True)
    end = trainer.run(stop)
    watchdog.disarm()
    kernels.drop_buffers()
    distributed.shutdown()
    if end and distributed.is_rank_zero():
        print(f"{end}: saved at step {trainer.state.step} of {trainer.steps}; the same command goes on from there", flush=True)
    elif distributed.is_rank_zero():
        if cfg.phase.export:
            export(cfg.phase_dir)
        run_dir.finish(cfg.phase_dir, trainer.state.step)


def export(phase_dir: Path) -> None:
    """The phase's last checkpoint as a Hugging Face folder with a model card, <phase>/hf."""
    from megatron_tower.training import card, checkpoint, convert

    last = checkpoint.latest(phase_dir)
    convert.to_hf(last.path, phase_dir / "hf")
    card.write(last, phase_dir / "hf")


def build(cfg: Config, start: "Path | Checkpoint") -> "Trainer":
    """The trainer at `start`, on initialised ranks: the phase's own checkpoint brings the optimizer and the step, others weights only."""
    from megatron_tower.data import build, tokenizer
    from megatron_tower.training import checkpoint, loading, saving
    from megatron_tower.training.trainer import Trainer

    tokens = tokenizer.load(Path(cfg.data.folder) / "tokenizer")
    steps = cfg.phase.train_steps or _steps(cfg, build.training_dataset(cfg, tokens, num_rows=1).rows_per_epoch)
    dataset = build.training_dataset(cfg, tokens, num_rows=steps * cfg.phase.global_batch_size)
    resumed = isinstance(start, checkpoint.Checkpoint) and start.path.parent.parent == cfg.phase_dir
    chunks = _chunks(cfg) if resumed else _weights(cfg, start)
    source = _source(cfg, dataset, tokens, chunks, steps, resumed)
    trainer = Trainer(cfg, chunks, source, steps)
    if resumed:
        loading.load(start, trainer.state)
    saving.make_room(cfg.phase_dir, trainer.state)
    return trainer


def _chunks(cfg: Config) -> list["Decoder"]:
    """This rank's part of the model, weights at random."""
    from megatron_tower.models.build import build_chunks

    return build_chunks(cfg.model, cfg.parallel, cfg.precision, cfg.overlap_tokens)


def _weights(cfg: Config, start: "Path | Checkpoint") -> list["Decoder"]:
    """The same with the weights at `start`."""
    from megatron_tower.models.hf import load_hf
    from megatron_tower.training import checkpoint, loading
    from megatron_tower.training.state import TrainingState

    chunks = _chunks(cfg)
    if isinstance(start, checkpoint.Checkpoint):
        loading.load(start, TrainingState(chunks))
    else:
        load_hf(chunks, cfg.model, start)
    return chunks


def _source(
    cfg: Config, dataset: object, tokens: "PreTrainedTokenizerBase", chunks: list["Decoder"], steps: int, resumed: bool
) -> "Source":
    """What gives the micro-batches. The reference model is what the phase started from, whatever step it is at now."""
    from megatron_tower.rewards.pool import VerifierPool
    from megatron_tower.rollout.experience import RolloutSource
    from megatron_tower.training import checkpoint, reference
    from megatron_tower.training.rounds import PreferenceSource, RowSource

    phase = cfg.phase
    if phase.dataset == "prompts":
        frozen = [chunk.eval().requires_grad_(False) for chunk in _weights(cfg, _start_from(cfg))] if phase.objective.kl else None
        pool = VerifierPool(phase.rollout.processes, phase.rollout.timeout)
        return RolloutSource(cfg, dataset, chunks[0], tokens, frozen, pool)
    if phase.dataset == "preferences":
        origin = _start_from(cfg)
        if phase.objective.reference == "live":
            asked = reference.LiveReference([chunk.eval().requires_grad_(False) for chunk in _weights(cfg, origin)])
        else:
            own = None if resumed else chunks
            asked = reference.stored(cfg, dataset, steps * phase.global_batch_size, own, checkpoint.fingerprint(origin))
        return PreferenceSource(cfg, dataset, asked)
    return RowSource(cfg, dataset)


def _start_from(cfg: Config) -> "Path | Checkpoint":
    """The HF folder or the checkpoint that `phase.start_from` means."""
    from megatron_tower.training import checkpoint

    return checkpoint.resolve(Path(cfg.phase.start_from), "phase.start_from")


def _steps(cfg: Config, rows_per_epoch: int) -> int:
    """Updates in `phase.epochs`; the last one, or round of them, is whole."""
    updates = cfg.phase.rollout.updates if cfg.phase.rollout else 1
    return math.ceil(cfg.phase.epochs * rows_per_epoch / cfg.phase.global_batch_size) * updates


if __name__ == "__main__":
    main()
