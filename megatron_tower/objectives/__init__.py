"""Objectives by the name that `phase.objective.name` gives: a model's `Head` or logits, and a batch in, `LossTerms` out."""

from typing import Protocol

from torch import Tensor

from megatron_tower.config import PhaseConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models.head import Head
from megatron_tower.objectives.causal_lm import CausalLM
from megatron_tower.objectives.grpo import GRPO
from megatron_tower.objectives.terms import LossTerms
from megatron_tower.objectives.wpo import WPO


class Objective(Protocol):
    def loss(self, given: Head | Tensor, batch: Batch) -> LossTerms:
        """given: a `Head`, or logits [batch, seq, vocab / tensor-parallel] -> a sum, its weight, and statistics over the same things."""

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of a step, from the means of the statistics."""

    def check_start(self, means: dict[str, float], params: str) -> None:
        """Raise InputError when the first batch, before any update, does not look as it must. params: the weights' type."""


def build(phase: PhaseConfig) -> Objective:
    """The phase's objective."""
    options = phase.objective
    if options.name == "wpo":
        return WPO(options)
    if options.name == "grpo":
        return GRPO(options, phase.rollout)
    return CausalLM()
