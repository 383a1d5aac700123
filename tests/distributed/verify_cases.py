"""Small models of every family for test_verify_conversion.py, and what a wrong conversion makes of one of their layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tower.config import ModelConfig, RopeScaling
from megatron_tower.models.families import family_of

FAMILIES = ("gemma2", "qwen2", "llama")
WINDOW = 16
LAYER = 2  # that is spoilt
Tensors = dict[str, Tensor]


def shape(family: str) -> ModelConfig:
    """Four layers with every feature of the family; 97 tokens, which no two ranks can share evenly."""
    gemma = {
        "attention_softcap": 20.0,
        "final_softcap": 30.0,
        "query_scale": 24,
        "sliding_window": WINDOW,
        "window_layers": [0, 2],
    }
    scaling = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    return ModelConfig(
        name=f"small_{family}",
        family=family,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=97,
        max_position_embeddings=128,
        tie_embeddings=family == "gemma2",
        qkv_bias=family == "qwen2",
        rope_scaling=scaling if family == "llama" else None,
        **(gemma if family == "gemma2" else {}),
    )


def write(family: str, folder: Path) -> Path:
    """An HF folder whose every weight, biases and norms included, is random; small embeddings, so that the layers have a say, some zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family_of(family).to_hf(shape(family))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "embed" in name else 0.3))
        model.get_input_embeddings().weight[:10] = 0.0
    model.save_pretrained(folder)
    return folder


def spoilt(folder: Path, copy: Path, how: str) -> Path:
    """A copy whose conversion is what a converter with that mistake would make of `folder`."""
    shutil.copytree(folder, copy)
    config, tensors = json.loads((copy / "config.json").read_text()), load_file(copy / "model.safetensors")
    SPOILS[how](config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _swap_gate_and_up(config: dict, tensors: Tensors) -> None:
    gate, up = (f"model.layers.{LAYER}.mlp.{which}_proj.weight" for which in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def _stack_queries_keys_values(config: dict, tensors: Tensors) -> None:
    """All queries above all keys above all values, as if nothing had been interleaved by query group."""
    model = family_of(config["model_type"]).from_hf(config)
    (weight,) = (
        w for w in family_of(model.family).all_weights(model) if w.megatron == f"decoder.layers.{LAYER}.self_attention.linear_qkv.weight"
    )
    stacked = torch.cat([tensors[name] for name in weight.hf])
    tensors |= {name: part.clone() for name, part in zip(weight.hf, weight.split(stacked, model, ranks=1), strict=True)}


def _norm_off_by_one(config: dict, tensors: Tensors) -> None:
    tensors[f"model.layers.{LAYER}.input_layernorm.weight"] += 1


def _swap_windows(config: dict, tensors: Tensors) -> None:
    config["layer_types"].reverse()


def _another_rope_base(config: dict, tensors: Tensors) -> None:
    config["rope_theta"] = 1e6


def _roll_vocabulary(config: dict, tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


SPOILS: dict[str, Callable[[dict, Tensors], None]] = {
    "gate and up swapped": _swap_gate_and_up,
    "queries, keys and values stacked": _stack_queries_keys_values,
    "norm off by one": _norm_off_by_one,
    "windows swapped": _swap_windows,
    "another rope base": _another_rope_base,
    "vocabulary rolled": _roll_vocabulary,
}
ONE_LAYER = ("gate and up swapped", "queries, keys and values stacked", "norm off by one")
IN_CONFIG = ("windows swapped", "another rope base")
