"""Attention that takes every mask, in plain PyTorch: the reference (`eager`), and PyTorch's fused kernel where it serves (`sdpa`).

    out = softmax(mask(cap * tanh(q k^T * scale / cap))) v        query i sees key j when  j <= i  and  i - j < window

Whatever the back end, queries that stand behind a cache are attended here.
Packed rows are cut into buckets of segments of similar length (packing.py).
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tower.models.packing import Packing


class Plain:
    """`eager`: float32 softmax, every feature; else sdpa, which has no soft-cap."""

    def __init__(self, eager: bool, scale: float, softcap: float | None, window: int | None):
        self.attend: Callable[..., Tensor]
        if eager:
            self.attend = partial(_eager, scale=scale, softcap=softcap, window=window)
        else:
            self.attend = partial(_sdpa, scale=scale, window=window)

    def rows(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        """q [s_q, batch, heads, dim], k and v [s_k, batch, groups, dim] -> [s_q, batch, heads * dim].

        Query i stands at position s_k - s_q + i. hidden: [batch, 1, 1, s_k] bool, True hides a key.
        """
        return self.attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), hidden).transpose(0, 1)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q [total, heads, dim], k and v [total, groups, dim] -> [total, heads * dim]."""
        buckets = zip(*map(packing.pad, (q, k, v)), strict=True)
        return packing.unpad([self.attend(*bucket, None) for bucket in buckets])


def _eager(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """The heads of one group are stacked along the query dimension, so that keys and values are never repeated."""
    batch, s_q, heads, dim = q.shape
    s_k, groups = k.shape[1:3]
    q = (q * (scale / (softcap or 1.0))).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, dim)
    k, v = (x.transpose(1, 2).reshape(batch * groups, s_k, dim) for x in (k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).float().view(batch, heads, s_q, s_k)
    if softcap is not None:
        scores = scores.tanh_()
    if _all_visible(s_q, s_k, window, hidden):
        scores = scores * (softcap or 1.0)
    else:
        scores = torch.add(_bias(s_q, s_k, window, hidden, q.device), scores, alpha=softcap or 1.0)
    probabilities = scores.softmax(dim=-1).to(v.dtype)
    out = torch.bmm(probabilities.view(batch * groups, -1, s_k), v)
    return out.view(batch, heads, s_q, dim).transpose(1, 2).reshape(batch, s_q, heads * dim)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, window: int | None) -> Tensor:
    s_q, s_k = q.shape[1], k.shape[1]
    causal_only = hidden is None and s_q == s_k and (window is None or s_k <= window)
    mask = None
    if not causal_only and not _all_visible(s_q, s_k, window, hidden):
        mask = _visible(s_q, s_k, window, hidden, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal_only, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


def _all_visible(s_q: int, s_k: int, window: int | None, hidden: Tensor | None) -> bool:
    """Whether nothing is masked: one new token that sees the whole cache."""
    return hidden is None and s_q == 1 and (window is None or s_k <= window)


def _visible(s_q: int, s_k: int, window: int | None, hidden: Tensor | None, device: torch.device) -> Tensor:
    """Bool [s_q, s_k], or [batch, 1, s_q, s_k] with hidden keys. A query always sees itself, so that padding gives no NaN."""
    visible = _causal(s_q, s_k, window, device)
    return visible if hidden is None else visible & (~hidden | _itself(s_q, s_k, device))


def _bias(s_q: int, s_k: int, window: int | None, hidden: Tensor | None, device: torch.device) -> Tensor:
    """`_visible` as numbers to add to scores."""
    if hidden is None:
        return _causal_bias(s_q, s_k, window, device)
    return _to_bias(_visible(s_q, s_k, window, hidden, device))


def _to_bias(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


# Masks are kept from layer to layer and from batch to batch.
@lru_cache(maxsize=16)
def _causal(s_q: int, s_k: int, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(s_k - s_q, s_k, device=device)[:, None] - torch.arange(s_k, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@lru_cache(maxsize=16)
def _itself(s_q: int, s_k: int, device: torch.device) -> Tensor:
    return torch.arange(s_k - s_q, s_k, device=device)[:, None] == torch.arange(s_k, device=device)


@lru_cache(maxsize=16)
def _causal_bias(s_q: int, s_k: int, window: int | None, device: torch.device) -> Tensor:
    return _to_bias(_causal(s_q, s_k, window, device))
