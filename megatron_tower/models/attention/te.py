"""Transformer Engine's attention through megatron-core's TEDotProductAttention. Has no soft-cap.

A model's config (`attention_backend=fused`) leaves TE nothing but cuDNN's kernels: where they don't serve, it raises and doesn't fall back
on plain PyTorch. Not run yet on a card inside this module.
"""

import copy
import os

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tower.models.packing import Packing


class TransformerEngine:
    """Keeps TE's module out of the model's: it has no weights, and its `_extra_state` must not reach a checkpoint."""

    def __init__(self, config: TransformerConfig, layer_number: int, window: int | None, **megatron: object):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention  # optional dependency

        if config.deterministic_mode:
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # TEDotProductAttention insists
        config = copy.copy(config)
        config.window_size, config.window_attn_skip_freq = None if window is None else (window - 1, 0), None
        megatron["softmax_scale"] = config.softmax_scale
        self.attend = TEDotProductAttention(config, layer_number, **megatron)

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [seq, batch, heads, dim], k and v [seq, batch, groups, dim] -> [seq, batch, heads * dim]."""
        return self.attend(q, k, v, None, attn_mask_type=AttnMaskType.causal)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q [total, heads, dim], k and v [total, groups, dim] -> [total, heads * dim]."""
        return self.attend(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packing)
