"""The head on a card: bf16 log-probabilities and gradients against float32 logits; float32 += bf16^T bf16 by the library's kernel.

Run:  pytest tests/gpu/test_gpu_head.py      not run yet on a card
"""

import pytest
import torch

from megatron_tower.models import head as heads
from megatron_tower.objectives.logprobs import token_logprobs, weighted_logprob

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
POSITIONS, HIDDEN, VOCABULARY = 2048, 256, 32000  # as one chunk large enough to be compiled, a hundred at once not


class Alone:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def made(dtype: torch.dtype) -> heads.Head:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(POSITIONS, 1, HIDDEN, generator=generator), 0.1 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
    values = (x.bfloat16().to("cuda", dtype).requires_grad_() for x in (hidden, weight))
    return heads.Head(*values, 30.0, VOCABULARY, Alone(), False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [heads.CHUNK, 100 * VOCABULARY])
def test_bfloat16_against_float32(monkeypatch: pytest.MonkeyPatch, chunk: int):
    """Both ways, with the weight's gradient in a float32 `main_grad` of which something is there already."""
    labels = torch.randint(VOCABULARY, (1, POSITIONS), generator=torch.Generator().manual_seed(1)).cuda()
    weights = torch.ones(1, POSITIONS, device="cuda")
    monkeypatch.setattr(heads, "CHUNK", 100 * VOCABULARY)
    exact = made(torch.float32)
    weighted_logprob(exact, labels, weights, exact.group).backward()
    monkeypatch.setattr(heads, "CHUNK", chunk)
    for way in (weighted_logprob, lambda head, labels, weights, group: (token_logprobs(head, labels, group) * weights).sum()):
        head = made(torch.bfloat16)
        head.weight.main_grad = torch.ones(VOCABULARY, HIDDEN, device="cuda")
        way(head, labels, weights, head.group).backward()
        assert head.weight.grad_added_to_main_grad
        assert relative(head.weight.main_grad - 1, exact.weight.grad) < 1e-2
        assert relative(head.hidden.grad, exact.hidden.grad) < 1e-2


def test_accumulation_is_float32():
    """A thousand small gradients on a large one, which bf16 would swallow."""
    rows, grad = torch.ones(16, 64, device="cuda").bfloat16(), torch.full((16, 128), 2.0**-8, device="cuda").bfloat16()
    total = torch.full((128, 64), 256.0, device="cuda")
    for _ in range(1000):
        heads.accumulate(total, grad, rows)
    torch.testing.assert_close(total, torch.full_like(total, 256.0 + 62.5))
