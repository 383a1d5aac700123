"""Where a step's micro-batches come from: rows of text, preference pairs with their reference log-probabilities.

A source has one method, `round(samples)`: what to learn from when `samples` of the dataset have been used up. Rollouts, which are
made by the model itself, are in `rollout/experience.py`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from megatron.core import parallel_state

from megatron_tower.config import Config
from megatron_tower.data.batch import Batch, PreferenceBatch, Round, SequenceBatch
from megatron_tower.data.preferences import Preferences
from megatron_tower.data.sequences import Encoded, micro_batches
from megatron_tower.runtime.distributed import device


class Source(Protocol):
    reads_weights: bool  # whether a round runs the model in training

    def round(self, samples: int) -> Round:
        """What the next updates learn from, on this data-parallel rank, after `samples` samples of the dataset."""


class RowSource:
    """Rows of one length; `dataset[i]` is the row with sample index i."""

    reads_weights = False

    def __init__(self, cfg: Config, dataset: Sequence[Batch]):
        self.cfg, self.dataset = cfg, dataset

    def round(self, samples: int) -> Round:
        rows = [Batch.stack([self.dataset[i] for i in part]).to(device()) for part in own_samples(self.cfg, samples)]
        return Round([rows], self.cfg.phase.global_batch_size)


class PreferenceSource:
    """Pairs, both answers of each in one micro-batch; `reference` gives the answers' log-probabilities under the reference model."""

    reads_weights = False

    def __init__(self, cfg: Config, dataset: Preferences, reference: "Reference"):
        self.cfg, self.dataset, self.reference = cfg, dataset, reference

    def round(self, samples: int) -> Round:
        groups = [[answer for i in part for answer in self.dataset[i]] for part in own_samples(self.cfg, samples)]
        batches = [batch.to(device()) for batch in micro_batches(groups, self.dataset.pad_id, self.cfg.parallel)]
        known = self.reference(groups, batches)
        pairs = [PreferenceBatch(**vars(batch), reference=logprobs) for batch, logprobs in zip(batches, known, strict=True)]
        return Round([pairs], self.cfg.phase.global_batch_size)


# The answers of each micro-batch as tokens, and laid out -> their summed log-probabilities, [answers] float64 a micro-batch.
Reference = Callable[[list[list[Encoded]], list[SequenceBatch]], list[torch.Tensor]]


def own_samples(cfg: Config, samples: int) -> list[range]:
    """Sample indices of this rank's micro-batches: the global batch's micro-batches are dealt in turn to the data-parallel ranks."""
    size, end = cfg.phase.micro_batch_size, samples + cfg.phase.global_batch_size
    starts = range(samples + parallel_state.get_data_parallel_rank() * size, end, size * cfg.parallel.data)
    return [range(start, start + size) for start in starts]
