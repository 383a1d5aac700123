"""Log-probabilities of given tokens over a vocab-parallel vocabulary, without gathering it, and what else one pass over logits gives.

    log p(y)          = z_y - LSE(z)                            LSE(z) = log sum_v exp(z_v),  z = logits / temperature
    log sum_v p(v)^2  = LSE(2z) - 2 LSE(z)                      the alignment term of WPO
    entropy           = - sum_v p(v) log p(v)

Each rank sums over its part of v (of the last two relative to its own LSE: float32 would cancel), then the ranks add up a few numbers
a token. They are found from logits, [batch, seq, vocab / tensor-parallel], or from a model's `Head`, whose logits are made chunk by
chunk, turned into their gradient in place, and dropped: once where the tokens' weights are known beforehand (`weighted_logprob`),
else in the forward pass and again in the backward pass, unless one chunk holds them all, which is kept.

float32 copies exist of a PIECE of logits at a time, on a GPU of none (`runtime/compiled.py`). Megatron's own cross entropy subtracts the
maximum from float32 logits in place: what the caller still holds is spoiled. This leaves them alone.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tower.models.head import Gradients, Head, added_to_main_grad
from megatron_tower.runtime.compiled import fuses, one_kernel

PIECE = 2**25  # logits in float32 at once: 128 MiB


def token_logprobs(given: Head | Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float = 1.0) -> Tensor:
    """log p of each label, [batch, seq] int64 over the whole vocabulary -> [batch, seq], in float32, or float64 if the logits are.

    given: a `Head`, or logits [..., seq, vocab / ranks of `group`].
    """
    return _logprobs(given, labels, group, temperature, "")[0]


def token_logprobs_and_collision(given: Head | Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and log sum_v p(v)^2 of each position (the log-probability that two draws agree), without gradient."""
    return _logprobs(given, labels, group, 1.0, "collision")


def token_logprobs_and_entropy(given: Head | Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each position in nats, without gradient."""
    return _logprobs(given, labels, group, temperature, "entropy")


def weighted_logprob(given: Head | Tensor, labels: Tensor, weights: Tensor, group: dist.ProcessGroup) -> Tensor:
    """sum of weights log p(labels), both [batch, seq]: a scalar.

    From a `Head`, the gradient is made along with it. Where the head's weight has a `main_grad`, it is added to that already here: what
    comes back from the loss must be 1, or the backward pass raises.
    """
    if isinstance(given, Tensor):
        return (token_logprobs(given, labels, group) * weights).sum()
    wanted = torch.is_grad_enabled() and given.hidden.requires_grad
    flat = given.to_positions(labels), given.to_positions(weights)
    return _WeightedFromHead.apply(given.hidden, given.weight, given, *flat, wanted)


def _logprobs(given: Head | Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float, extra: str) -> tuple[Tensor, Tensor]:
    """-> (log p, the extra or an empty tensor), of the shape of labels; the extra has no gradient."""
    if isinstance(given, Tensor):
        return _FromLogits.apply(given, labels, group, temperature, extra)
    found = _FromHead.apply(given.hidden, given.weight, given, given.to_positions(labels), temperature, extra)
    logprobs, more = (given.from_positions(values, labels) if len(values) else values for values in found)
    return logprobs, more


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, temperature: float, extra: str) -> tuple[Tensor, Tensor]:
        local, here = _own(labels, logits.shape[-1], group)
        logp, total, more = _over_ranks(_local_terms(logits, local, temperature, extra), here, group, extra)
        ctx.save_for_backward(logits, local, here, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(more)
        return logp, more

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, here, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        _write_gradient(out, logits, local, here, total, grad, ctx.temperature)
        return out, None, None, None, None


class _FromHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, head: Head, labels: Tensor, temperature: float, extra: str) -> tuple[Tensor, Tensor]:
        local, here = _own(labels, len(weight), head.group)
        rows, parts, kept = head.rows(), [], None
        chunks = head.chunks(rows)
        for part in chunks:
            logits = head.logits(rows[part])
            parts.append(_local_terms(logits, local[part], temperature, extra))
            kept = logits if len(chunks) == 1 else None
            del logits  # or the next chunk's would be there beside it
        logp, total, more = _over_ranks([torch.cat(terms) for terms in zip(*parts, strict=True)], here, head.group, extra)
        ctx.save_for_backward(hidden, weight, local, here, total, kept)
        ctx.head, ctx.temperature = head, temperature
        ctx.mark_non_differentiable(more)
        return logp, more

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, local, here, total, kept = ctx.saved_tensors
        head = ctx.head
        rows = head.rows()
        gradients = Gradients(head, rows)
        for part in head.chunks(rows):
            logits = head.logits(rows[part]) if kept is None else kept
            _write_gradient(logits, logits, local[part], here[part], total[part], grad[part], ctx.temperature, head.softcap)
            gradients.add(part, logits)
            del logits
        of_hidden, of_weight = gradients.sums()
        if of_weight is None:
            added_to_main_grad(weight)
        return of_hidden, of_weight, None, None, None, None


class _WeightedFromHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, head: Head, labels: Tensor, weights: Tensor, wanted: bool) -> Tensor:
        local, here = _own(labels, len(weight), head.group)
        rows, sums = head.rows(), []
        gradients = Gradients(head, rows) if wanted else None
        for part in head.chunks(rows):
            logits = head.logits(rows[part])
            logp, total, _ = _over_ranks(_local_terms(logits, local[part], 1.0, ""), here[part], head.group, "")
            sums.append((logp * weights[part]).sum())
            if wanted:
                _write_gradient(logits, logits, local[part], here[part], total, weights[part], 1.0, head.softcap)
                gradients.add(part, logits)
            del logits
        if wanted:
            ctx.save_for_backward(weight, *gradients.sums())
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, of_hidden, of_weight = ctx.saved_tensors
        if of_weight is not None:
            return of_hidden * grad, of_weight * grad, None, None, None, None
        torch._assert_async(grad == 1, "the head's weight gradient is already in main_grad: differentiate the sum itself, unscaled")
        added_to_main_grad(weight)
        return of_hidden, None, None, None, None, None


def _own(labels: Tensor, width: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The labels within this rank's part of the vocabulary, [..., 1], and which are there."""
    local = labels - group.rank() * width
    return local.clamp(0, width - 1).unsqueeze(-1), (local >= 0) & (local < width)


def _over_ranks(terms: list[Tensor], here: Tensor, group: dist.ProcessGroup, extra: str) -> tuple[Tensor, Tensor, Tensor]:
    """log p, LSE(z) and the extra over the whole vocabulary, from what `_local_terms` finds in the ranks' parts."""
    target, total, more = terms
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
    if extra:
        more = more.log() if extra == "collision" else -more
    return target - total, total, more


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of the sequence, the last dimension but one."""
    if fuses(logits):
        yield slice(None)
        return
    positions = logits.shape[-2]
    step = max(1, PIECE * positions // logits.numel()) if logits.numel() else 1
    yield from (slice(start, start + step) for start in range(0, positions, step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if temperature == 1 else z / temperature


def _local_terms(logits: Tensor, labels: Tensor, temperature: float, extra: str) -> list[Tensor]:
    """The label's z, LSE(z), and sum p^2 or sum p log p, over this rank's part of the vocabulary (p = softmax of that part)."""
    parts = [_terms(logits[..., part, :], labels[..., part, :], temperature, extra) for part in _pieces(logits)]
    return [torch.cat(terms, dim=-1) for terms in zip(*parts, strict=True)]


@one_kernel
def _terms(logits: Tensor, labels: Tensor, temperature: float, extra: str) -> tuple[Tensor, Tensor, Tensor]:
    z = _scaled(logits, temperature)
    target, total = z.gather(-1, labels).squeeze(-1), z.logsumexp(-1)
    if not extra:
        return target, total, total.new_empty((*total.shape[:-1], 0))
    logp = z - total[..., None]
    return target, total, (2 * logp).exp().sum(-1) if extra == "collision" else (logp.exp() * logp).sum(-1)


def _write_gradient(
    out: Tensor, logits: Tensor, local: Tensor, here: Tensor, total: Tensor, grad: Tensor, temperature: float, cap: float | None = None
) -> None:
    """d/d logits of sum grad log p into `out`, which may be `logits`; cap: of what was there before it made logits of that."""
    grad = (grad / temperature).unsqueeze(-1)
    for part in _pieces(logits):
        z, into, index, above = logits[..., part, :], out[..., part, :], local[..., part, :], grad[..., part, :]
        found = _scaled(z.gather(-1, index), temperature)
        own = here[..., part, None].to(found.dtype)
        at_label = above * (own - (found - total[..., part, None]).exp()) * _slope(found, temperature, cap)
        into.copy_(_elsewhere(z, total[..., part, None], above, temperature, cap))
        into.scatter_(-1, index, at_label.to(into.dtype))


@one_kernel
def _elsewhere(logits: Tensor, total: Tensor, grad: Tensor, temperature: float, cap: float | None) -> Tensor:
    """The gradient of logits that are not the label's: -p, times what comes from above."""
    z = _scaled(logits, temperature)
    piece = (z - total).exp_().mul_(-grad)
    return (piece if cap is None else piece.mul_(_slope(z, temperature, cap))).to(logits.dtype)


def _slope(z: Tensor, temperature: float, cap: float | None) -> Tensor | float:
    """Of the soft-cap that made `z` times `temperature`."""
    return 1.0 if cap is None else (z * (temperature / cap)).square_().neg_().add_(1.0)
