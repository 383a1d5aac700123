"""Llama 2, 3 and 3.1 (arXiv 2307.09288, 2407.21783) and what is built like them, Tower v1 and EuroLLM: SwiGLU, no biases, scaled RoPE."""

import torch.nn.functional as F

from megatron_tower.config import ModelConfig
from megatron_tower.models.mapping import CONFIG, DECODER, PRE_MLP_NORM, Family


def derive(model: ModelConfig) -> dict[str, object]:
    return {"head_dim": model.kv_channels, "num_key_value_heads": model.num_query_groups}


def recover(hf: dict) -> dict[str, object]:
    """Folders of the first years leave both out."""
    return {
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "num_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
    }


LLAMA = Family(
    activation=F.silu,
    renamed={key: ours for key, ours in CONFIG.items() if key != "num_key_value_heads"},
    defaults={"rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02},
    constants={
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    derive=derive,
    recover=recover,
    weights=(*DECODER, PRE_MLP_NORM),
)
