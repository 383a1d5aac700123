"""A decoder layer's short way when it generates, on the weights and modules it trains with.

Megatron-core's layer (0.16.1) passes through much that only training needs, and its attention caches keys before RoPE, so that the whole
cache is rotated again, sines and cosines included, for each new token. Here a key is rotated once, when it enters.
Serves static batches (`StaticInferenceContext`); without one, the stock forward runs.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


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
        start = inference_context.sequence_len_offset
        end = start + key.size(0)
        both = torch.cat([query, key], dim=2)
        both = apply_rotary_pos_emb(both, rotary_pos_emb[start:end], self.config, cp_group=self.pg_collection.cp)
        query, key = both.split([query.size(2), key.size(2)], dim=2)
        if start == 0:
            room = inference_context.max_sequence_length, *key.shape[1:]
            inference_context.key_value_memory_dict[self.layer_number] = key.new_empty(room), value.new_empty(room)
        keys, values = inference_context.key_value_memory_dict[self.layer_number]
        keys[start:end], values[start:end] = key, value
        return self.linear_proj(self.core_attention(query, keys[:end], values[:end], attention_mask))
