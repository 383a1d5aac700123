# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_objectives.py: python -m tests.unit.objective_cases"""

from megatron_tower.runtime import cpu

cpu.install()

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tower.config import ClusterConfig, ParallelConfig
from megatron_tower.data.batch import Batch
from megatron_tower.objectives.causal_lm import CausalLM
from megatron_tower.runtime import distributed

VOCABULARY = 10


def logits_and_batch() -> tuple[Tensor, Batch]:
    """Logits [3, 7, vocabulary] in float64, large enough to overflow exp in float32, and labels all over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCABULARY, (3, 7), generator=generator)
    mask = (torch.rand(3, 7, generator=generator) < 0.5).float()
    logits = torch.randn(3, 7, VOCABULARY, generator=generator, dtype=torch.float64) * 40
    return logits, Batch(labels, labels, mask, labels)


def check() -> None:
    """CausalLM on this rank's slice of the vocabulary against the formula in float64."""
    logits, batch = logits_and_batch()
    logits.requires_grad_()
    expected = 0.0
    for b, t in batch.loss_mask.nonzero().tolist():
        z = logits[b, t]
        expected = expected + torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[batch.labels[b, t]]
    expected.backward()
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    mine = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    slice_ = logits.detach()[..., mine].float().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # strides as the model's
    terms = CausalLM().loss(slice_, batch)
    terms.sum.backward()
    torch.testing.assert_close(terms.sum.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.stats["loss"], terms.sum.detach())
    assert terms.weight == batch.loss_mask.sum()
    torch.testing.assert_close(slice_.grad.double(), logits.grad[..., mine], rtol=1e-5, atol=1e-6)


def main() -> None:
    distributed.initialize(ParallelConfig(name="tp2", tensor=2), 1234, ClusterConfig(name="local"))
    check()


if __name__ == "__main__":
    main()
