"""The one attention of every model: soft-cap, sliding window, grouped queries, packed sequences, key-value cache.

    out = softmax(mask(cap * tanh(q k^T * scale / cap))) v        query i sees key j when  j <= i  and  i - j < window

Given to megatron-core's SelfAttention as `core_attention`. Back ends, a config word (`model.attention_backend`):
    eager  the reference: float32 softmax, every feature
    sdpa   torch.nn.functional.scaled_dot_product_attention: everything but the soft-cap
    auto   sdpa where it can, else eager
Leaves out: context parallelism, attention dropout, fused soft-cap kernels for GPUs.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_tower.models.packing import Packing


class CoreAttention(nn.Module):
    """Attention between given queries, keys and values of one layer; holds no weights.

    `window_layers` are counted from 0, megatron's `layer_number` from 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        backend: str,
        softcap: float | None,
        window: int | None,
        window_layers: tuple[int, ...],
        **_: object,  # mask type, attention type, process groups: megatron passes them to every core attention
    ):
        super().__init__()
        self.scale = config.softmax_scale
        self.softcap = softcap
        self.window = window if layer_number - 1 in window_layers else None
        self.eager = backend == "eager" or softcap is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Packing | None = None,
        **_: object,
    ) -> Tensor:
        """Queries [s_q, batch, heads, dim], keys and values [s_k, batch, groups, dim] -> [s_q, batch, heads * dim].

        With fewer queries than keys (a cache), query i stands at position s_k - s_q + i.
        attention_mask: [batch, 1, 1, s_k] bool, True hides a key (the padding left of a prompt); None hides nothing.
        packed_seq_params: then everything is [total, heads, dim], without a batch dimension, and returns [total, heads * dim].
        """
        if packed_seq_params is None:
            out = self.attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), attention_mask)
            return out.transpose(0, 1)
        buckets = zip(*map(packed_seq_params.pad, (query, key, value)), strict=True)
        return packed_seq_params.unpad([self.attend(q, k, v, None) for q, k, v in buckets])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """q [batch, s_q, heads, dim], k and v [batch, s_k, groups, dim], hidden as above -> [batch, s_q, heads * dim]."""
        if self.eager:
            return _eager(q, k, v, hidden, self.scale, self.softcap, self.window)
        return _sdpa(q, k, v, hidden, self.scale, self.window)


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
