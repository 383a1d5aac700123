"""The next token from the last position's logits, each tensor-parallel rank holding its share of the vocabulary.

Greedy takes the largest logit and, of equal ones, the lowest id. Sampling inverts the cumulative distribution at one given
number in [0, 1), laid out in the order of ids: the choice depends on nothing else, so neither the batch a row sits in nor
the layout changes it, and the rounding that differs between layouts moves the borders by as little as itself.

Leaves out: top-k, penalties, beam search.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

SORTED = 1024  # tokens of a row, most probable first, that are looked at before the whole vocabulary is sorted


def next_tokens(logits: Tensor, numbers: Tensor, temperature: float, top_p: float, group: ProcessGroup) -> Tensor:
    """Token ids [batch], the same on every rank of the tensor-parallel `group`.

    logits: [batch, vocab/tp]; numbers: [batch], uniform in [0, 1); temperature 0 is greedy and ignores them.
    """
    if temperature == 0:
        return _greedy(logits, group)
    return _sample(torch.cat(_shards(logits, group), dim=-1), numbers, temperature, top_p)


def _greedy(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Largest logit of all ranks by exchanging each rank's own largest: two numbers a row instead of a vocabulary."""
    largest, index = logits.max(dim=-1)  # the first of equal values
    if group.size() == 1:
        return index
    values = torch.stack(_shards(largest, group))
    ids = torch.stack(_shards(index + group.rank() * logits.size(-1), group))
    return ids.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0)  # equal values: the first rank, which has the lowest ids


def _sample(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Inverse-transform sampling from softmax(logits / temperature) [batch, vocab], cut to its nucleus (arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`, plus those as probable as its last.
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        probabilities = probabilities.masked_fill(probabilities < _least(probabilities, top_p), 0)
    cumulative = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return chosen.squeeze(1).clamp_(max=logits.size(-1) - 1)


def _least(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability of the nucleus, [batch, 1]. Few tokens are sorted if they hold the mass, as they do but for flat rows."""
    falling = probabilities.topk(min(SORTED, probabilities.size(-1))).values
    mass = falling.cumsum(dim=-1)
    if (mass[:, -1] < top_p).any():
        falling = probabilities.sort(dim=-1, descending=True).values
        mass = falling.cumsum(dim=-1)
    return falling.masked_fill(mass - falling >= top_p, torch.inf).amin(dim=-1, keepdim=True)


def _shards(share: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, in the order of ranks."""
    if group.size() == 1:
        return [share]
    shards = [torch.empty_like(share) for _ in range(group.size())]
    dist.all_gather(shards, share.contiguous(), group=group)
    return shards
