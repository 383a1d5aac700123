"""Gemma 2 (arXiv 2408.00118): soft-caps, a sliding window on every other layer, four norms a layer that multiply by 1 + weight."""

from functools import partial

import torch.nn.functional as F

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.models.mapping import CONFIG, DECODER, Family, Weight


def derive(model: ModelConfig) -> dict[str, object]:
    return {
        "query_pre_attn_scalar": model.query_scale or model.kv_channels,
        "layer_types": ["sliding_attention" if layer in model.window_layers else "full_attention" for layer in range(model.num_layers)],
    }


def recover(hf: dict) -> dict[str, object]:
    alternating = ["sliding_attention", "full_attention"] * hf["num_hidden_layers"]  # what HF assumes in older folders
    layer_types = hf.get("layer_types") or alternating[: hf["num_hidden_layers"]]
    if len(layer_types) != hf["num_hidden_layers"] or set(layer_types) - set(alternating):
        raise InputError(f"config.json says layer_types={layer_types} for {hf['num_hidden_layers']} layers: use another model")
    return {
        "query_scale": hf["query_pre_attn_scalar"],
        "window_layers": [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"],
    }


GEMMA2 = Family(
    activation=partial(F.gelu, approximate="tanh"),
    zero_centered_norms=True,
    sandwich_norms=True,
    scaled_embedding=True,
    renamed=CONFIG
    | {
        "head_dim": "kv_channels",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "final_softcap",
        "sliding_window": "sliding_window",
    },
    defaults={"rope_theta": 10000.0, "tie_word_embeddings": True, "query_pre_attn_scalar": 256},
    constants={
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    },
    derive=derive,
    recover=recover,
    weights=(
        *DECODER,
        Weight(
            "decoder.layers.{}.self_attention.linear_proj.post_norm.weight",
            {"model.layers.{}.post_attention_layernorm.weight": ("hidden",)},
        ),
        Weight("decoder.layers.{}.pre_mlp_layernorm.weight", {"model.layers.{}.pre_feedforward_layernorm.weight": ("hidden",)}),
        Weight("decoder.layers.{}.mlp.linear_fc2.post_norm.weight", {"model.layers.{}.post_feedforward_layernorm.weight": ("hidden",)}),
    ),
)
