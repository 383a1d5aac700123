"""Log-probabilities of given tokens under vocab-parallel logits, in float32, without gathering the vocabulary.

    log p(y) = z_y - log sum_v exp(z_v)      each rank sums over its part of v, then the ranks add up two numbers a token

Megatron's own cross entropy subtracts the maximum from float32 logits in place: what the caller still holds is spoiled. This one leaves
them alone and keeps one copy of them for the backward pass.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = logits.shape[-1]
        local = labels - group.rank() * size
        here = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1).unsqueeze(-1)
        target = logits.gather(-1, local).squeeze(-1).float().masked_fill(~here, 0.0)
        total = logits.float().logsumexp(-1)
        if group.size() > 1:
            largest = total.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            both = torch.stack([(total - largest).exp(), target])
            dist.all_reduce(both, group=group)
            total, target = largest + both[0].log(), both[1]
        ctx.save_for_backward(logits, local, here, total)
        return target - total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, local, here, total = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        out = torch.sub(logits.float(), total.unsqueeze(-1)).exp_().mul_(-grad)  # -p, times what comes from above
        out.scatter_add_(-1, local, grad * here.unsqueeze(-1))
        return out.to(logits.dtype), None, None


def token_logprobs(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log p of each label: logits [..., vocab / ranks of `group`], labels [...] int64 over the whole vocabulary -> [...] float32."""
    return _TokenLogprobs.apply(logits, labels, group)
