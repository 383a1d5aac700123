"""Soft-capped logits, cap * tanh(z / cap), in place: on a CPU each copy of them costs about as much as the head's matrix product."""

import torch
from torch import Tensor

from megatron_tower.runtime.compiled import one_kernel


@one_kernel
def _cap(logits: Tensor, cap: float) -> None:
    logits.div_(cap).tanh_().mul_(cap)


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, cap: float) -> Tensor:
        _cap(logits, cap)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        ctx.cap = cap
        return logits

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (capped,) = ctx.saved_tensors
        return capped.square().mul_(-1.0 / ctx.cap**2).add_(1.0).mul_(grad), None


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Overwrites `logits`, which nothing else may need."""
    return _SoftCap.apply(logits, cap)
