"""The head: from hidden states to logits over a vocab-parallel vocabulary, some positions at a time, so that all logits never exist.

    z  = cap * tanh(h W^T / cap)                              without the tanh where there is no soft-cap; NEVER where there is no token
    dh = sum over tensor-parallel ranks of (dz s) W           s = 1 - (z / cap)^2, which objectives/logprobs.py multiplies in
    dW = (dz s)^T h

A model's last stage hands objectives its hidden states in a `Head` instead of [batch, seq, vocabulary] logits: for 4,096 tokens and a
vocabulary of 256,000 these, their gradient and float32 copies are gigabytes, and were the most of a step's memory. What is computed
of them chunk by chunk: objectives/logprobs.py. Generation and verification, which need logits, ask the model for them.

Leaves out: beginning the sum over ranks of dh before the last chunk is done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tower.models.softcap import softcap

NEVER = -1e9  # the logit of what is no token: its probability is exactly 0, and at any temperature finite
CHUNK = 2**28
"""Logits of a rank that exist at once: half a GiB in bf16. At 256,000 tokens a chunk is 1,048 positions: each chunk reads W twice and adds
to dW once, which for fewer positions takes longer than the arithmetic; more would bring little and take memory from the layers."""


def finished(logits: Tensor, cap: float | None, tokens: int) -> Tensor:
    """Soft-cap, and NEVER from the `tokens`-th logit on: [..., vocab / tensor-parallel] -> the same. Overwrites `logits`."""
    if cap is not None:
        logits = softcap(logits, cap)
    if padding := logits.shape[-1] - tokens:
        logits = F.pad(logits[..., :tokens], (0, padding), value=NEVER)
    return logits


@dataclass(frozen=True)
class Head:
    """hidden: [seq, batch, hidden] as the last layer left it; this rank's [seq / tensor-parallel, batch, hidden] under
    sequence parallelism.
    weight: [vocab / tensor-parallel, hidden], of which the first `tokens` rows are tokens of this rank. softcap: of the logits.

    "Positions" below are seq * batch, in the order of `hidden` laid out; a packed batch is one row, so for it they are batch * seq.
    """

    hidden: Tensor
    weight: Tensor
    softcap: float | None
    tokens: int
    group: dist.ProcessGroup
    sequence_parallel: bool

    def to_positions(self, values: Tensor) -> Tensor:
        """[batch, seq] of a `Batch` -> [positions]."""
        return values.reshape(self.hidden.shape[1], -1).t().flatten()

    def from_positions(self, values: Tensor, batch: Tensor) -> Tensor:
        """[positions] -> [batch, seq], the shape of `batch`, laid out as that: ranks may be sent it."""
        return values.view(-1, self.hidden.shape[1]).t().reshape(batch.shape).contiguous()

    @torch.no_grad()
    def rows(self) -> Tensor:
        """Hidden states of all positions, [positions, hidden], gathered from the ranks where each has some; not differentiable."""
        if not self.sequence_parallel:
            return self.hidden.flatten(0, 1)
        seq, *others = self.hidden.shape
        whole = self.hidden.new_empty(seq * self.group.size(), *others)
        dist.all_gather_into_tensor(whole, self.hidden.contiguous(), group=self.group)
        return whole.flatten(0, 1)

    def chunks(self, rows: Tensor) -> list[slice]:
        """Of positions."""
        step = max(1, CHUNK // len(self.weight))
        return [slice(start, start + step) for start in range(0, len(rows), step)]

    def logits(self, rows: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab / tensor-parallel], a tensor of its own; not differentiable."""
        with torch.no_grad():
            return finished(F.linear(rows, self.weight), self.softcap, self.tokens)


class Gradients:
    """Of a head's hidden states and weight, from those of its matrix product's outputs, chunk by chunk.

    The weight's goes to `weight.main_grad` where a gradient buffer has given it one, in that one's type, as in megatron-core's fused
    accumulation; only without is it returned.
    """

    def __init__(self, head: Head, rows: Tensor):
        self.head, self.rows = head, rows
        self.of_rows = torch.empty_like(rows)
        self.main = getattr(head.weight, "main_grad", None)
        self.of_weight = self.main
        if self.main is None:
            self.of_weight = head.weight.new_zeros(head.weight.shape, dtype=torch.promote_types(head.weight.dtype, torch.float32))

    def add(self, part: slice, grad: Tensor) -> None:
        """grad: [n, vocab / tensor-parallel], of the products of `rows[part]`."""
        torch.mm(grad, self.head.weight.detach(), out=self.of_rows[part])
        accumulate(self.of_weight, grad, self.rows[part])

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """Of `head.hidden`, summed over ranks, and of the weight unless `main_grad` has it."""
        head, found = self.head, self.of_rows.view(-1, *self.head.hidden.shape[1:])
        if head.sequence_parallel:
            found, whole = torch.empty_like(head.hidden, memory_format=torch.contiguous_format), found
            dist.reduce_scatter_tensor(found, whole, group=head.group)
        elif head.group.size() > 1:
            dist.all_reduce(found, group=head.group)
        return found, self.of_weight.to(head.weight.dtype) if self.main is None else None


def added_to_main_grad(weight: Tensor) -> None:
    """In a backward pass, which returns None for `weight`: tell the gradient buffer that `main_grad` has the gradient.

    An embedding that shares it on this rank (zero_out_wgrad) has a gradient of its own, which the buffer then adds. Otherwise one is
    looked for when reduction overlaps the backward pass, and then ignored: megatron-core makes an empty tensor of the weight's size,
    here it is a single number seen that often.
    """
    if not getattr(weight, "zero_out_wgrad", False):
        weight.grad = weight.new_zeros(()).expand(weight.shape)
    weight.grad_added_to_main_grad = True


def accumulate(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total [out, in] += grad [n, out]^T rows [n, in]: in one kernel where `total` is of the factors' type, or a library has one."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), rows)
    elif total.is_cuda and total.dtype == torch.float32 and (fused := _accumulating_gemm()):
        fused(total, grad, rows)
    else:
        total.add_(grad.t() @ rows)


@cache
def _accumulating_gemm() -> Callable[[Tensor, Tensor, Tensor], object] | None:
    """float32 += bf16^T bf16 on CUDA: (total, grad, rows). Transformer Engine's, else Apex's, else None. Not run yet on a card."""
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        return lambda total, grad, rows: general_gemm(rows, grad, out_dtype=total.dtype, accumulate=True, layout="NT", out=total, grad=True)
    except ImportError:
        pass
    try:
        from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32

        return lambda total, grad, rows: wgrad_gemm_accum_fp32(rows, grad, total)
    except ImportError:
        return None
