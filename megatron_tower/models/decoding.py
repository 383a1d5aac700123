"""A decoder layer's short way when it generates, on the weights and modules it trains with.

Megatron-core's layer (0.16.1) passes through much that only training needs, and its attention caches keys before RoPE, so that the whole
cache is rotated again, sines and cosines included, for each new token. Here a key is rotated once, when it enters.
Serves static batches (`StaticInferenceContext`), whose cache is read as far as it is filled, and steps of fixed shape (`FixedContext`);
without either, the stock forward runs.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_tower.models.attention import CoreAttention


class FixedContext(StaticInferenceContext):
    """One new token a row at a slot that only the device knows, so that a step's kernels and shapes are those of every other step.

    caches: layer -> keys and values [slots, rows or more, groups, dim]; slot: [1] int64, the one to write; padding: [rows] int64, slots
    to the left that hold no token; span: slots that are looked at, all beyond `slot` being hidden.
    """

    def __init__(self, caches: dict[int, tuple[Tensor, Tensor]], slot: Tensor, padding: Tensor, slots: int, span: int):
        super().__init__(len(padding), slots)
        self.enable_decode_mode()
        self.key_value_memory_dict, self.slot, self.span = caches, slot, span
        self.places = torch.arange(span, device=slot.device)
        self.hidden = ((self.places < padding[:, None]) | (self.places > slot))[:, None, None]  # [rows, 1, 1, span]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, core: CoreAttention) -> Tensor:
        """Query, key and value of one token a row, [1, rows, heads or groups, dim] -> [1, rows, heads * dim]."""
        rows = query.size(1)
        keys, values = (cache[:, :rows] for cache in self.key_value_memory_dict[layer])
        keys.index_copy_(0, self.slot, key)
        values.index_copy_(0, self.slot, value)
        hidden = self.hidden if core.window is None else self.hidden | (self.places <= self.slot - core.window)
        return _attend_one(query, keys[: self.span], values[: self.span], hidden, core.scale, core.softcap)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of one query a row over a cache [span, rows, groups, dim] of which `hidden` alone says what is seen; nothing is copied."""
    _, rows, heads, dim = query.shape
    groups = keys.size(2)
    keys, values = keys.permute(1, 2, 3, 0).flatten(0, 1), values.permute(1, 2, 0, 3).flatten(0, 1)
    scores = torch.bmm((query * (scale / (softcap or 1.0))).view(rows * groups, -1, dim), keys).float()
    if softcap is not None:
        scores = scores.tanh_().mul_(softcap)
    scores = scores.view(rows, groups, heads // groups, -1).masked_fill_(hidden, float("-inf"))
    probabilities = scores.softmax(dim=-1).to(values.dtype).flatten(0, 1)
    return torch.bmm(probabilities, values).view(1, rows, heads * dim)


class DecodingLayer(TransformerLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: StaticInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """[s_new, batch, hidden] -> the same; biases and dropout are not added, for no family has them here."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others)
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0], None


class CachingSelfAttention(SelfAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        inference_context: StaticInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[s_new, batch, hidden] -> the same; the cache of this layer, keys and values [s, batch, groups, dim], is filled up by s_new."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if isinstance(inference_context, FixedContext):
            query, key = self._rotated(query, key, rotary_pos_emb.index_select(0, inference_context.slot))
            return self.linear_proj(inference_context.attend(self.layer_number, query, key, value, self.core_attention))
        start = inference_context.sequence_len_offset
        end = start + key.size(0)
        query, key = self._rotated(query, key, rotary_pos_emb[start:end])
        if start == 0:
            room = inference_context.max_sequence_length, *key.shape[1:]
            inference_context.key_value_memory_dict[self.layer_number] = key.new_empty(room), value.new_empty(room)
        keys, values = inference_context.key_value_memory_dict[self.layer_number]
        keys[start:end], values[start:end] = key, value
        return self.linear_proj(self.core_attention(query, keys[:end], values[:end], attention_mask))

    def _rotated(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        both = apply_rotary_pos_emb(torch.cat([query, key], dim=2), angles, self.config, cp_group=self.pg_collection.cp)
        return both.split([query.size(2), key.size(2)], dim=2)
