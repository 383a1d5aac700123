"""Small Hugging Face folders with all that travels with weights, written by safetensors' own writer; conversions to be killed."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import ModelConfig, RopeScaling
from megatron_tower.data import tokenizer
from megatron_tower.models.families import family_of
from megatron_tower.models.hf import random_hf
from megatron_tower.training import convert

SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
MODELS = {
    "qwen2": ModelConfig(name="q", family="qwen2", qkv_bias=True, tie_embeddings=False, **SHAPE),
    "qwen2_tied": ModelConfig(name="t", family="qwen2", qkv_bias=True, tie_embeddings=True, **SHAPE),
    "gemma2": ModelConfig(
        name="g", family="gemma2", attention_softcap=50.0, final_softcap=30.0, sliding_window=8, window_layers=[0, 2], **SHAPE
    ),
    "llama": ModelConfig(name="l", family="llama", rope_scaling=RopeScaling("llama3", 8.0), tie_embeddings=False, **SHAPE),
}
SMALL_FILES = {
    "generation_config.json": '{"do_sample": true,  "eos_token_id": [1, 7]}',
    "tokenizer.json": '{"added_tokens": [{"id": 1, "content": "<eos>"}], "model": {}}',
    "tokenizer_config.json": '{"eos_token": "<eos>"}',
    "special_tokens_map.json": '{"eos_token": "<eos>"}',
    "chat_template.jinja": "{{ messages }}",
}


def random_tensors(model: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Every bit pattern may come, infinities and NaN too: a copy must not care."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (weight.shapes(model) for weight in family_of(model.family).all_weights(model))
    return {
        name: torch.randint(-(2**15), 2**15, (*shape[:-1], shape[-1] * dtype.itemsize // 2), generator=generator, dtype=torch.int16).view(
            dtype
        )
        for some in shapes
        for name, shape in some.items()
    }


def write(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.bfloat16, files: int = 3, seed: int = 0) -> Path:
    """A folder of `files` shards with an index, or of one file without."""
    folder.mkdir(parents=True)
    tensors = random_tensors(model, dtype, seed)
    shards = {f"model-{i + 1:05d}-of-{files:05d}.safetensors": list(tensors)[i::files] for i in range(files)}
    if files == 1:
        shards = {"model.safetensors": list(tensors)}
    else:
        where = {name: file for file, names in shards.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    config = family_of(model.family).to_hf(model) | {"torch_dtype": str(dtype).removeprefix("torch."), "_name_or_path": "somebody/else"}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    for name, text in SMALL_FILES.items():
        (folder / name).write_text(text)
    return folder


def answering(folder: Path) -> Path:
    """Below it a folder of random weights, whose answers are of all lengths and mostly don't end."""
    tokenizer.train(["the quick brown fox jumps over the lazy dog " * 5, "What is 1 plus 2? " * 3], "gemma2", 330, folder / "tokenizer")
    shape = ("num_layers=2", "window_layers=[0]", "hidden_size=32", "ffn_hidden_size=48", "kv_channels=8", "max_position_embeddings=256")
    cfg = load(["model=tiny_gemma2", "data.vocab_size=330", *(f"model.{word}" for word in shape)])
    random_hf(cfg.model, folder / "hf", folder / "tokenizer", seed=1)
    return folder / "hf"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by safetensors."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two folders hold the same names, types, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def import_in_parts(source: Path, output: Path) -> None:
    """Many small files, in a process that a test kills."""
    convert.SHARD = 1 << 20
    convert.to_megatron(source, output, tensor=2, pipeline=2)


def export_in_parts(source: Path, output: Path) -> None:
    convert.SHARD = 1 << 20
    convert.to_hf(source, output)
