"""A decoder layer's short way when it generates, on the weights and modules it trains with.

Megatron-core's layer (0.16.1) passes through much that only training needs, and its attention caches keys before RoPE, so that the whole
cache is rotated again, sines and cosines included, for each new token. Here a key is rotated once, when it enters.
What is computed and where keys and values go, a context says: `PromptContext` for a batch's prompts, then for each new token
`GrowingContext`, whose cache is read as far as it is filled, or `FixedContext`, whose shapes stay. Without one the stock forward runs.

    slots of a row's cache    0 ... nothing ... padding[row] ... its prompt ... width ... its answer ... width + new
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_tower.models.attention import CoreAttention
from megatron_tower.models.packing import pack


class PromptContext(StaticInferenceContext):
    """Prompts laid end to end in one row, [1, total]: kernels for packed rows serve it, and no padding is computed.

    padding: [prompts] int64 on the CPU, slots to the left of each that hold no token; ends: [prompts], the last token of each in the row.
    """

    def __init__(self, lengths: Sequence[int], slots: int, device: torch.device):
        super().__init__(len(lengths), slots)
        bounds = torch.tensor([0, *accumulate(lengths)])
        self.width = max(lengths)
        self.padding = self.width - bounds.diff()
        self.packing = pack(bounds, device)
        rows = torch.arange(len(lengths)).repeat_interleave(bounds.diff())
        self.places = (torch.arange(len(rows)) + (self.padding - bounds[:-1])[rows]).to(device)  # the slot of each token
        self.rows, self.ends = rows.to(device), (bounds[1:] - 1).to(device)

    def angles(self, of_slots: Tensor) -> Tensor:
        return of_slots.index_select(0, self.places)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, core: CoreAttention) -> Tensor:
        """Query, key and value [total, 1, heads or groups, dim] -> [total, 1, heads * dim]; fills the layer's cache."""
        query, key, value = (part.squeeze(1) for part in (query, key, value))
        caches = []
        for part in (key, value):
            cache = part.new_zeros(self.max_sequence_length, self.max_batch_size, *part.shape[1:])  # a hidden NaN would still be one
            cache[self.places, self.rows] = part
            caches.append(cache)
        self.key_value_memory_dict[layer] = tuple(caches)
        return core(query, key, value, None, packed_seq_params=self.packing).unsqueeze(1)


class GrowingContext(StaticInferenceContext):
    """One new token a row, in the slot behind what the prompts and the tokens before it filled."""

    def __init__(self, prompts: PromptContext):
        super().__init__(prompts.max_batch_size, prompts.max_sequence_length)
        self.enable_decode_mode()
        self.key_value_memory_dict, self.sequence_len_offset = prompts.key_value_memory_dict, prompts.width
        self.hidden = None  # [rows, 1, 1, slots], True where a row holds no token
        if prompts.padding.any():
            self.hidden = (torch.arange(prompts.max_sequence_length) < prompts.padding[:, None])[:, None, None].to(prompts.rows.device)

    def take(self, rows: list[int] | Tensor) -> None:
        """Go on with these rows, one of them several times or never."""
        for layer, (keys, values) in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = keys[:, rows], values[:, rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]

    def angles(self, of_slots: Tensor) -> Tensor:
        return of_slots[self.sequence_len_offset : self.sequence_len_offset + 1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, core: CoreAttention) -> Tensor:
        """Query, key and value of one token a row, [1, rows, heads or groups, dim] -> [1, rows, heads * dim]."""
        keys, values = self.key_value_memory_dict[layer]
        start, end = self.sequence_len_offset, self.sequence_len_offset + 1
        keys[start:end], values[start:end] = key, value
        return core(query, keys[:end], values[:end], None if self.hidden is None else self.hidden[..., :end])


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

    def angles(self, of_slots: Tensor) -> Tensor:
        return of_slots.index_select(0, self.slot)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, core: CoreAttention) -> Tensor:
        """As `GrowingContext.attend`."""
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


Context = PromptContext | GrowingContext | FixedContext


class DecodingLayer(TransformerLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Context | None = None,
        rotary_pos_emb: Tensor | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """[s_new, batch, hidden] -> the same; biases and dropout are not added, for no family has them here."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(normed, None, inference_context=inference_context, rotary_pos_emb=rotary_pos_emb)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0], None


class CachingSelfAttention(SelfAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        inference_context: Context | None = None,
        rotary_pos_emb: Tensor | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[s_new, batch, hidden] -> the same; with a context no mask is read. Caches are keys and values [slots, rows, groups, dim]."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        angles, both = inference_context.angles(rotary_pos_emb), torch.cat([query, key], dim=2)
        both = apply_rotary_pos_emb(both, angles, self.config, cp_group=self.pg_collection.cp)
        query, key = both.split([query.size(2), key.size(2)], dim=2)
        return self.linear_proj(inference_context.attend(self.layer_number, query, key, value, self.core_attention))
