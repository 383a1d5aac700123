"""Qwen 2.5 (arXiv 2412.15115): SwiGLU, biases on queries, keys and values, head tied in the small models only."""

import torch.nn.functional as F

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.models.mapping import CONFIG, DECODER, PRE_MLP_NORM, Family, Weight


def derive(model: ModelConfig) -> dict[str, object]:
    return {"head_dim": model.kv_channels}


def recover(hf: dict) -> dict[str, object]:
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f"config.json says layer_types={hf['layer_types']}, but windows are built for gemma2 only: use another model")
    return {"kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"], "qkv_bias": True}


QWEN2 = Family(
    activation=F.silu,
    renamed=CONFIG,
    defaults={"rope_theta": 10000.0, "tie_word_embeddings": False},
    constants={
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
    },
    derive=derive,
    recover=recover,
    weights=(
        *DECODER,
        Weight(
            "decoder.layers.{}.self_attention.linear_qkv.bias",
            {
                "model.layers.{}.self_attn.q_proj.bias": ("queries",),
                "model.layers.{}.self_attn.k_proj.bias": ("keys",),
                "model.layers.{}.self_attn.v_proj.bias": ("keys",),
            },
            shard=0,
            per_group=True,
        ),
        PRE_MLP_NORM,
    ),
)
