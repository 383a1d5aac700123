"""What one decoder layer is made of: megatron-core's modules, our attention and norms, Gemma's sandwich where the family has it.

The sandwich's second slice (a norm after attention and after the MLP, before the residual is added) sits at the end of the row-parallel
linear whose output it norms; so it is sharded, checkpointed and recomputed with it. Transformer Engine computes the norms before
attention and MLP in the column-parallel linear behind them, in FP8 without a copy in bf16 between the two.
"""

from functools import partial

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_tower.config import ModelConfig
from megatron_tower.models import kernels
from megatron_tower.models.attention import CoreAttention
from megatron_tower.models.decoding import CachingSelfAttention, DecodingLayer
from megatron_tower.models.mapping import Family
from megatron_tower.models.norm import NormOfLinear, RMSNorm


class NormedOutput:
    """Before a row-parallel linear in the bases: its output is normed."""

    def __init__(self, *args: object, config: TransformerConfig, **kwargs: object):
        super().__init__(*args, config=config, **kwargs)
        self.post_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        output, bias = super().forward(x)
        return self.post_norm(output), bias


class GatedMLP(MLP):
    """Megatron's MLP with act(gate) * up alone: the stock one makes a copy of `up` to add an offset of zero."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        if self.config.transformer_impl == "transformer_engine":
            return self.linear_fc2(kernels.gated(gate_up, gelu=self.config.activation_func is not F.silu))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.linear_fc2(self.config.activation_func(gate) * up)


class FusedLayer(DecodingLayer):
    """Its linears behind a norm compute the norm."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.input_layernorm.hand_to(self.self_attention.linear_qkv)
        self.pre_mlp_layernorm.hand_to(self.mlp.linear_fc1)


def layer_spec(model: ModelConfig, family: Family, fused: bool) -> ModuleSpec:
    """The spec of every layer of `model`. `fused`: of Transformer Engine's linears instead of megatron-core's."""
    column, row = _linears(fused)
    layer, norm = (FusedLayer, NormOfLinear) if fused else (DecodingLayer, RMSNorm)
    if family.sandwich_norms:
        row = type(f"Normed{row.__name__}", (NormedOutput, row), {})
    attention = partial(
        CoreAttention,
        backend=model.attention_backend,
        softcap=model.attention_softcap,
        window=model.sliding_window,
        window_layers=tuple(model.window_layers),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=CachingSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=attention, linear_proj=row),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_builder(column, row),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_builder(column: type[nn.Module], row: type[nn.Module]) -> type[GatedMLP]:
    """A class, not a ModuleSpec: for a spec, TransformerLayer warns of every class but MLP itself."""

    class Built(GatedMLP):
        def __init__(self, config: TransformerConfig):
            super().__init__(config, MLPSubmodules(linear_fc1=column, linear_fc2=row), ffn_hidden_size=config.ffn_hidden_size)

    return Built


def _linears(fused: bool) -> tuple[type[nn.Module], type[nn.Module]]:
    if not fused:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions import transformer_engine as te  # optional dependency

    return te.TELayerNormColumnParallelLinear, te.TERowParallelLinear
