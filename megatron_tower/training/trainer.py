"""The training loop: the same for every phase, on any layout of ranks.

An update reads `global_batch_size` rows, in the order (seed, sample index) alone decides; each data-parallel rank takes its share in
micro-batches, megatron-core's schedule runs them through the pipeline, and gradients, summed over everything, are divided once:

    gradient = sum_rows d loss_sum / sum_rows weight

so that neither the micro-batch size nor the number of ranks shows in the result. Leaves out: prefetching, overlap of communication.
"""

import math
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_tower.config import Config
from megatron_tower.data.batch import Batch
from megatron_tower.models.forward import forward
from megatron_tower.objectives import OBJECTIVES
from megatron_tower.runtime.distributed import device
from megatron_tower.runtime.progress import Progress
from megatron_tower.runtime.signals import StopSignal
from megatron_tower.training import checkpoint
from megatron_tower.training.optimizer import build_optimizer, lr_at, set_lr
from megatron_tower.training.state import TrainingState
from megatron_tower.training.throughput import throughput


def wrap(chunks: list[MegatronModule], cfg: Config) -> list[DistributedDataParallel]:
    """Chunks whose gradients are accumulated in fp32 and reduced over data-parallel ranks."""
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=cfg.parallel.distributed_optimizer)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.broadcast_params()
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if cfg.parallel.virtual_pipeline:  # in one batch, two stages' sends to and fro take each other's messages, and the loss is wrong
            chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = True, False
    return wrapped


class Trainer:
    """Trains `state` on `dataset` for `steps` updates; `dataset[i]` is the row with sample index i."""

    def __init__(self, cfg: Config, chunks: list[MegatronModule], dataset: object, steps: int):
        self.cfg, self.dataset, self.steps = cfg, dataset, steps
        self.objective = OBJECTIVES[cfg.phase.objective]()
        wrapped = wrap(chunks, cfg)
        self.state = TrainingState(wrapped, build_optimizer(wrapped, cfg))
        self.schedule = get_forward_backward_func()
        self.micro_batches = cfg.phase.global_batch_size // (cfg.phase.micro_batch_size * cfg.parallel.data)
        self.packed = dataset[0].cu_seqlens is not None

    def run(self, stop: StopSignal) -> str | None:
        """Train from `state.step` to the last step, saving as configured; returns the signal that ended it early, else None."""
        state, phase = self.state, self.cfg.phase
        with Progress(self.cfg, self.steps, done=state.step) as progress:
            signal = None
            while state.step < self.steps and not signal:
                started = time.perf_counter()
                values = self.step()
                tokens = phase.global_batch_size * phase.seq_length
                values |= throughput(self.cfg.model, phase.seq_length, tokens, time.perf_counter() - started)
                progress.log(state.step, values)
                signal = stop.agreed()
                if signal or state.step == self.steps or (phase.save_every and state.step % phase.save_every == 0):
                    checkpoint.save(self.cfg.phase_dir, state, self.cfg.model, phase.keep_last)
        return signal if state.step < self.steps else None

    def step(self) -> dict[str, float]:
        """Forward and backward over the next global batch, normalised once, updated once; returns loss, gradient norm, learning rate."""
        state, phase = self.state, self.cfg.phase
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        terms = self.schedule(
            forward_step_func=self._forward,
            data_iterator=[self._rows() for _ in state.chunks],
            model=state.chunks,
            num_microbatches=self.micro_batches,
            seq_length=phase.seq_length * (phase.micro_batch_size if self.packed else 1),
            micro_batch_size=1 if self.packed else phase.micro_batch_size,
            forward_only=False,
        )
        values = _mean(terms) | {"lr": lr_at(state.step + 1, self.steps, phase.optimizer)}
        set_lr(state.optimizer, values["lr"])
        _, gradient_norm, _ = state.optimizer.step()
        values["gradient_norm"] = float(gradient_norm)
        if not math.isfinite(values["loss"] + values["gradient_norm"]):
            raise FloatingPointError(
                f"step {state.step + 1} is not finite ({values}): lower the learning rate and resume, nothing of it was saved"
            )
        state.step += 1
        state.samples += phase.global_batch_size
        return values

    def _rows(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next global batch: rows first .. first + global_batch_size, dealt in turn to the ranks."""
        size, ranks = self.cfg.phase.micro_batch_size, self.cfg.parallel.data
        for i in range(self.micro_batches):
            first = self.state.samples + (i * ranks + parallel_state.get_data_parallel_rank()) * size
            rows = Batch.stack([self.dataset[j] for j in range(first, first + size)])
            yield self.objective.prepare(rows.to(device()))

    def _forward(self, rows: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
        batch = next(rows)
        return forward(model, batch), partial(self._loss, batch)

    def _loss(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As megatron-core's schedules want it: the sum to differentiate, its weight, what to remember."""
        terms = self.objective.loss(logits, batch)
        return terms.sum, terms.weight.to(torch.int), {"weight": terms.weight} | terms.stats


def _mean(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sums of all micro-batches and data-parallel ranks over their weight, from the last pipeline stage to every rank."""
    sums: list[dict[str, float]] = [{}]
    if terms:
        names = sorted(terms[0])
        total = torch.stack([torch.stack([t[name].double() for name in names]) for t in terms]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        sums = [dict(zip(names, total.tolist(), strict=True))]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(sums, last, parallel_state.get_pipeline_model_parallel_group(), device())
    weight = sums[0].pop("weight")
    return {name: value / weight for name, value in sums[0].items()}
