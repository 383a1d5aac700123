"""flash-attn 2.8, flash-attn-4 and megatron-core's TEDotProductAttention with their signatures, computed naively: as strict about layouts,
types and windows as their documentation, so that a back end that calls them wrongly fails on a CPU too."""

import sys
from types import ModuleType

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn.attention import flex_attention

CALLS: list[dict] = []  # what the kernels were asked, oldest first


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, left: int | None) -> Tensor:
    """One sequence, causal: [seq, heads, dim], [seq, groups, dim] -> [seq, heads, dim]; keys more than `left` behind are hidden."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(len(q))[:, None] - torch.arange(len(k))
    hidden = (behind < 0) if left is None else (behind < 0) | (behind > left)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def _rows(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    assert q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]  # [batch, seq, heads, dim]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and k.shape == v.shape and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return torch.stack([_one(*row, *rest) for row in zip(q, k, v, strict=True)])


def _packed(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int], *rest: object) -> Tensor:
    assert q.ndim == k.ndim == v.ndim == 3 and len(q) == len(k) == len(v)  # [total, heads, dim]
    assert all(b.dtype == torch.int32 and b[0] == 0 and b[-1] == len(q) and b.is_contiguous() for b in bounds)
    lengths = bounds[0].diff().tolist()
    assert torch.equal(*bounds) and all(type(n) is int and n == max(lengths) for n in longest)
    return torch.cat([_one(*piece, *rest) for piece in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])


def _left(window: tuple, none: object) -> int | None:
    left, right = window
    assert (left, right) == (none, none) or (left >= 0 and right == 0), f"{window} is no causal window"
    return None if left == none else left


def _flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
            deterministic=False, return_attn_probs=False):  # fmt: skip
    CALLS.append({"window_size": window_size, "deterministic": deterministic})
    assert causal
    return _rows(q, k, v, softmax_scale, softcap, _left(window_size, -1))


def _flash2_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
                   window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
                   block_table=None):  # fmt: skip
    CALLS.append({"window_size": window_size, "deterministic": deterministic})
    assert causal
    ends = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, *ends, softmax_scale, softcap, _left(window_size, -1))


def _flash4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
            softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False):  # fmt: skip
    CALLS.append({"window_size": window_size, "deterministic": deterministic})
    assert causal
    return _rows(q, k, v, softmax_scale, softcap, _left(window_size, None)), torch.zeros(())  # and the log-sum-exps


def _flash4_varlen(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
                   seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
                   window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
                   deterministic=False):  # fmt: skip
    CALLS.append({"window_size": window_size, "deterministic": deterministic})
    assert causal
    ends = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, *ends, softmax_scale, softcap, _left(window_size, None)), torch.zeros(())


class TEDotProductAttention(nn.Module):
    """Windows come from the config, as (left, right); packed rows from the field `qkv_format` of what is handed over."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None, k_channels=None,
                 v_channels=None, num_splits=None, cp_comm_type="p2p", pg_collection=None):  # fmt: skip
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.left = _left(config.window_size, None) if windowed else None
        self.scale = softmax_scale
        self.register_buffer("_extra_state", torch.zeros(1))

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None, num_splits=None):
        assert attention_mask is None and attn_mask_type == AttnMaskType.causal
        if packed_seq_params is None:
            rows = (x.transpose(0, 1) for x in (query, key, value))
            return _rows(*rows, self.scale, 0.0, self.left).transpose(0, 1).flatten(2)
        p: PackedSeqParams = packed_seq_params
        assert p.qkv_format == "thd" and p.cp_group is None and p.local_cp_size is None and p.cu_seqlens_q_padded is None
        ends = (p.cu_seqlens_q, p.cu_seqlens_kv), (p.max_seqlen_q, p.max_seqlen_kv)
        return _packed(query, key, value, *ends, self.scale, 0.0, self.left).flatten(1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes where the packages would be; FlexAttention uncompiled, with the backward pass that it denies a CPU."""
    CALLS.clear()
    for name, contents in {
        "flash_attn": {"flash_attn_func": _flash2, "flash_attn_varlen_func": _flash2_varlen},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"flash_attn_func": _flash4, "flash_attn_varlen_func": _flash4_varlen},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.TEDotProductAttention", TEDotProductAttention)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
