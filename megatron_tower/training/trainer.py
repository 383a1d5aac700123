"""The training loop: the same for every phase, on any layout of ranks.

A source gives the micro-batches of one or more updates (a round): rows of text, preference pairs, or answers that the model itself has
just sampled. Which samples of the dataset they come from, (seed, sample index) alone decides. Megatron-core's schedule runs an update's
micro-batches through the pipeline, and gradients, summed over everything, are divided once:

    gradient = sum d loss_sum / sum weight

so that neither the micro-batch size nor the number of ranks shows in the result. Leaves out: prefetching.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_tower import objectives
from megatron_tower.config import Config
from megatron_tower.data.batch import Batch, Round
from megatron_tower.models.forward import forward_to_head, schedule_shape
from megatron_tower.models.head import Head
from megatron_tower.runtime import watchdog
from megatron_tower.runtime.distributed import device
from megatron_tower.runtime.progress import Progress
from megatron_tower.runtime.stop import StopSignal
from megatron_tower.training import fp8
from megatron_tower.training.optimizer import build_optimizer, lr_at, set_lr
from megatron_tower.training.rounds import Source
from megatron_tower.training.saving import Saver
from megatron_tower.training.state import TrainingState
from megatron_tower.training.throughput import throughput

SAVES = 2  # of the longest duration so far, within which the last save is surely over: one beside the training may be before it
RECENT = 20  # rounds whose longest tells how long the next may take


def wrap(chunks: list[MegatronModule], cfg: Config) -> list[DistributedDataParallel]:
    """Chunks whose gradients are accumulated in `parallel.gradients` and reduced over data-parallel ranks."""
    par, in_fp8 = cfg.parallel, cfg.precision.fp8_param_gather
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=par.gradients == "float32",
        use_distributed_optimizer=par.distributed_optimizer,
        overlap_grad_reduce=par.overlap,
        overlap_param_gather=par.overlap and par.distributed_optimizer,
        fp8_param_gather=in_fp8,
    )
    if in_fp8:
        for chunk in chunks:
            fp8.keep_weights(chunk)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    for chunk in wrapped:
        if not in_fp8:
            chunk.broadcast_params()
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if par.overlap:
            chunk.config.no_sync_func = [c.no_sync for c in wrapped] if par.virtual_pipeline else chunk.no_sync
        if par.virtual_pipeline:  # in one batch, two stages' sends to and fro take each other's messages, and the loss is wrong
            chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = True, False
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # of Transformer Engine: weight gradients are made in main_grad
                module.fuse_wgrad_accumulation = True
    return wrapped


class Trainer:
    """Trains `state` for `steps` updates on what `source` gives."""

    def __init__(self, cfg: Config, chunks: list[MegatronModule], source: Source, steps: int):
        self.cfg, self.source, self.steps = cfg, source, steps
        self.objective = objectives.build(cfg.phase)
        wrapped = wrap(chunks, cfg)
        self.state = TrainingState(wrapped, build_optimizer(wrapped, cfg))
        self.schedule = get_forward_backward_func()
        self.round = Round([], samples=0)  # its updates that are still to be made

    def run(self, stop: StopSignal) -> str | None:
        """Train from `state.step` to the last step, saving as configured; returns what ended it early, else None.

        A checkpoint holds no half round: what is due then is saved when the round is over.
        """
        state, every = self.state, self.cfg.phase.save_every
        rounds, begun, end, due = deque(maxlen=RECENT), time.perf_counter(), None, False
        with Progress(self.cfg, self.steps, done=state.step) as progress, Saver(self.cfg) as saver:
            while state.step < self.steps and not (end and not self.round.updates):
                watchdog.alive()
                started = time.perf_counter()
                values = self.step()
                values |= throughput(self.cfg.model, self.cfg.phase.seq_length, values["tokens"], time.perf_counter() - started)
                progress.log(state.step, values)
                saver.poll()
                asked = stop.agreed(max([*rounds, time.perf_counter() - begun]) + SAVES * saver.longest)
                end = end or asked.end
                due = due or asked.save or end or state.step == self.steps or (every and state.step % every == 0)
                if not self.round.updates:
                    rounds.append(time.perf_counter() - begun)
                    if due:
                        watchdog.alive()
                        saver.save(state)
                    begun, due = time.perf_counter(), False
            watchdog.alive()
        return end if state.step < self.steps else None

    def step(self) -> dict[str, float]:
        """One update: forward, backward, gradients normalised once.

        Returns the objective's statistics, gradient norm and learning rate; with the first update of a round, also the round's.
        """
        state = self.state
        told = {}
        if not self.round.updates:
            if self.source.reads_weights:
                state.gather()
            self.round = self.source.round(state.samples)
            state.samples += self.round.samples
            told = self.round.stats
        began = time.perf_counter()
        means = self._accumulate(self.round.updates.pop(0))
        if state.step == 0:
            self.objective.check_start(means, self.cfg.precision.params)
        lr = lr_at(state.step + 1, self.steps, self.cfg.phase.optimizer)
        set_lr(state.optimizer, lr)
        _, gradient_norm, _ = state.optimizer.step()
        if not math.isfinite(means["loss"] + gradient_norm):
            raise FloatingPointError(
                f"step {state.step + 1} is not finite (loss {means['loss']}, gradient norm {gradient_norm}): "
                "lower the learning rate and resume, nothing of it was saved"
            )
        state.step += 1
        state.tokens += round(means["tokens"])
        seconds = {"seconds_update": time.perf_counter() - began}
        return self.objective.summary(means) | told | {"lr": lr, "gradient_norm": float(gradient_norm)} | seconds

    def _accumulate(self, batches: list[Batch]) -> dict[str, float]:
        """Gradients of this rank's micro-batches of one update; the objective's means over all ranks."""
        state = self.state
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        terms = self.schedule(
            forward_step_func=self._forward,
            data_iterator=[iter(batches) for _ in state.chunks],
            model=state.chunks,
            num_microbatches=len(batches),
            **schedule_shape(batches[0]),
            forward_only=False,
        )
        return _mean(terms)

    def _forward(self, batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Head | Tensor, partial]:
        batch = next(batches)
        return forward_to_head(model, batch), partial(self._loss, batch)

    def _loss(self, batch: Batch, head: Head) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As megatron-core's schedules want it: the sum to differentiate, its weight, what to remember."""
        terms = self.objective.loss(head, batch)
        tokens = torch.tensor(batch.tokens.numel(), device=head.hidden.device)
        return terms.sum, terms.weight.to(torch.int), {"weight": terms.weight, "tokens": tokens} | terms.stats


def _mean(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sums of all micro-batches and data-parallel ranks over their weight, from the last pipeline stage to every rank.

    `tokens` stays a sum. Where nothing has weight (no rollout was worth learning from) the means are 0.
    """
    sums: list[dict[str, float]] = [{}]
    if terms:
        names = sorted(terms[0])
        total = torch.stack([torch.stack([t[name].double() for name in names]) for t in terms]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        sums = [dict(zip(names, total.tolist(), strict=True))]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(sums, last, parallel_state.get_pipeline_model_parallel_group(), device())
    tokens, weight = {"tokens": sums[0].pop("tokens")}, sums[0].pop("weight")
    return {name: value / (weight or 1) for name, value in sums[0].items()} | tokens
