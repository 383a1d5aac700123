"""The one attention of every model: soft-cap, sliding window, grouped queries, packed sequences, key-value cache.

    out = softmax(mask(cap * tanh(q k^T * scale / cap))) v        query i sees key j when  j <= i  and  i - j < window

Given to megatron-core's SelfAttention as `core_attention`. Back ends, a config word (`model.attention_backend`), one file each:
    eager   the reference: float32 softmax, every feature                          plain.py
    sdpa    torch.nn.functional.scaled_dot_product_attention: no soft-cap          plain.py
    flex    torch.nn.attention.flex_attention, compiled                            flex.py
    flash2  flash-attn 2.6 or newer                                                flash.py
    flash4  flash-attn-4                                                           flash.py
    te      Transformer Engine's (cuDNN): no soft-cap                              te.py
    auto    the fastest of these that is installed and serves the model            choice.py
A kernel (flex, flash, te) serves whole causal sequences, packed or not. Behind a cache eager or sdpa takes over.
Leaves out: context parallelism, attention dropout. The kernels were not run yet on a card inside this module (tests/gpu does it).
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_tower.models.attention.choice import Wanted, choose
from megatron_tower.models.attention.flash import Flash
from megatron_tower.models.attention.flex import Flex
from megatron_tower.models.attention.plain import Plain
from megatron_tower.models.attention.te import TransformerEngine
from megatron_tower.models.packing import Packing
from megatron_tower.runtime.distributed import device


class CoreAttention(nn.Module):
    """Attention between given queries, keys and values of one layer; holds no weights.

    `window_layers` are counted from 0, megatron's `layer_number` from 1. InputError when `backend` is not installed or can't serve.
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
        **megatron: object,  # mask type, attention type, process groups: megatron passes them to every core attention
    ):
        super().__init__()
        self.scale, self.softcap = config.softmax_scale, softcap
        self.window = window if layer_number - 1 in window_layers else None
        where = device()
        capability = torch.cuda.get_device_capability(where) if where.type == "cuda" else None
        self.backend = choose(backend, Wanted(softcap is not None, config.kv_channels, config.params_dtype, capability))
        asked = self.scale, softcap, self.window
        self.plain = Plain(self.backend == "eager" or softcap is not None, *asked)
        if self.backend in ("flash2", "flash4"):
            self.kernel = Flash(int(self.backend[-1]), *asked, deterministic=config.deterministic_mode)
        elif self.backend == "flex":
            self.kernel = Flex(*asked)
        elif self.backend == "te":
            self.kernel = TransformerEngine(config, layer_number, self.window, **megatron)
        else:
            self.kernel = self.plain

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
        attention_mask: [batch, 1, 1, s_k] bool, True hides a key (a slot of the cache without a token); None hides nothing.
        packed_seq_params: then everything is [total, heads, dim], without a batch dimension, and returns [total, heads * dim].
        """
        if packed_seq_params is not None:
            return self.kernel.packed(query, key, value, packed_seq_params)
        if attention_mask is None and len(query) == len(key):
            return self.kernel.rows(query, key, value)
        return self.plain.rows(query, key, value, attention_mask)
