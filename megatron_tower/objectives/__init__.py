"""Objectives by the name that `phase.objective` gives: logits and a batch in, `LossTerms` out."""

from megatron_tower.objectives.causal_lm import CausalLM

OBJECTIVES = {"causal_lm": CausalLM}
