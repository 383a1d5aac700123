"""Log-probabilities of given tokens under vocab-parallel logits, without gathering the vocabulary, and what else one pass over them gives.

    log p(y)          = z_y - LSE(z)                            LSE(z) = log sum_v exp(z_v),  z = logits / temperature
    log sum_v p(v)^2  = LSE(2z) - 2 LSE(z)                      the alignment term of WPO
    entropy           = - sum_v p(v) log p(v)

Each rank sums over its part of v (of the last two relative to its own LSE: float32 would cancel), then the ranks add up a few numbers
a token. Logits are read in chunks of the sequence, so that
float32 copies of a large vocabulary never exist as a whole; their gradient is written chunk by chunk in their own type.
Megatron's own cross entropy subtracts the maximum from float32 logits in place: what the caller still holds is spoiled. This leaves
them alone.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 2**25  # logits worked on at once: 128 MiB in float32


class _TokenLogprobs(torch.autograd.Function):
    """-> (log p [...], the extra [...] or an empty tensor); the extra has no gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float, extra: str) -> tuple[Tensor, Tensor]:
        vocabulary = logits.shape[-1]
        local = labels - group.rank() * vocabulary
        here = (local >= 0) & (local < vocabulary)
        local = local.clamp(0, vocabulary - 1).unsqueeze(-1)
        parts = [_local_terms(logits[..., part, :], local[..., part, :], temperature, extra) for part in _chunks(logits)]
        target, total, more = (torch.cat(terms, dim=-1) for terms in zip(*parts, strict=True))
        target = target.masked_fill(~here, 0.0)
        if group.size() > 1:
            largest = total.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            mass = (total - largest).exp()  # of this rank, up to a factor that all share
            sums = [target, mass]
            if extra:
                sums.append(mass.square() * more if extra == "collision" else mass * (more + total - largest))
            sums = torch.stack(sums)
            dist.all_reduce(sums, group=group)
            target, mass, total = sums[0], sums[1], largest + sums[1].log()
            if extra:
                more = sums[2] / mass.square() if extra == "collision" else sums[2] / mass - mass.log()
        ctx.save_for_backward(logits, local, here, total)
        ctx.temperature = temperature
        if extra:
            more = more.log() if extra == "collision" else -more
        ctx.mark_non_differentiable(more)
        return target - total, more

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, here, total = ctx.saved_tensors
        grad = (grad / ctx.temperature).unsqueeze(-1)
        out = torch.empty_like(logits)
        for part in _chunks(logits):
            z = _scaled(logits[..., part, :], ctx.temperature)
            piece = torch.sub(z, total[..., part, None]).exp_().mul_(-grad[..., part, :])  # -p, times what comes from above
            piece.scatter_add_(-1, local[..., part, :], grad[..., part, :] * here[..., part, None])
            out[..., part, :] = piece
        return out, None, None, None, None


def token_logprobs(logits: Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float = 1.0) -> Tensor:
    """log p of each label: logits [..., seq, vocab / ranks of `group`], labels [..., seq] int64 over the whole vocabulary -> [..., seq].

    In float32, or float64 if the logits are.
    """
    return _TokenLogprobs.apply(logits, labels, group, temperature, "")[0]


def token_logprobs_and_collision(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and log sum_v p(v)^2 of each position (the log-probability that two draws agree), without gradient."""
    return _TokenLogprobs.apply(logits, labels, group, 1.0, "collision")


def token_logprobs_and_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each position in nats, without gradient."""
    return _TokenLogprobs.apply(logits, labels, group, temperature, "entropy")


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the sequence, the last dimension but one."""
    positions = logits.shape[-2]
    step = max(1, CHUNK * positions // logits.numel()) if logits.numel() else 1
    return (slice(start, start + step) for start in range(0, positions, step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if temperature == 1 else z / temperature


def _local_terms(logits: Tensor, labels: Tensor, temperature: float, extra: str) -> tuple[Tensor, Tensor, Tensor]:
    """The label's z, LSE(z), and sum p^2 or sum p log p, over this rank's part of the vocabulary (p = softmax of that part)."""
    z = _scaled(logits, temperature)
    target, total = z.gather(-1, labels).squeeze(-1), z.logsumexp(-1)
    if not extra:
        return target, total, total.new_empty((*total.shape[:-1], 0))
    logp = z - total[..., None]
    return target, total, (2 * logp).exp().sum(-1) if extra == "collision" else (logp.exp() * logp).sum(-1)
