"""Hugging Face folders in and out of a sharded Megatron model: safetensors, config.json and tokenizer.

    load_hf(chunks, cfg.model, folder)                  each rank reads its own slices
    save_hf(chunks, cfg.model, folder, tokenizer)       gathered over tensor and pipeline ranks, written by rank 0, whole or not at all
    random_hf(cfg.model, folder, tokenizer_folder, seed)

A round trip is bit-identical. Leaves out: models larger than rank 0's memory, pickled weights, remote code.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.models.families import family_of
from megatron_tower.models.mapping import Weight, differences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"


def model_config(folder: Path | str) -> ModelConfig:
    """ModelConfig of an HF folder, from its config.json; `hf_folder` is set to it."""
    folder = Path(folder)
    try:
        hf = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json cannot be read ({error}): give a Hugging Face model folder") from error
    try:
        model = family_of(str(hf.get("model_type"))).from_hf(hf)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    model.name, model.hf_folder = folder.name, str(folder)
    return model


def load_hf(chunks: list[nn.Module], model: ModelConfig, folder: Path | str) -> None:
    """Fill this rank's part of the model from `folder`. Everything is checked first: InputError names the field or the tensor."""
    folder = Path(folder)
    apart = differences(model, model_config(folder))
    if apart:
        raise InputError(f"model={model.name} and {folder} differ: {'; '.join(apart)}: choose the model config of this folder")
    weights = {weight.megatron: weight for weight in family_of(model.family).all_weights(model)}
    files = _find_tensors(folder, _shapes(model, weights.values()))
    opened = {file: safe_open(file, framework="pt") for file in set(files.values())}
    tensor_parallel = chunks[0].pg_collection.tp
    rank, ranks = tensor_parallel.rank(), tensor_parallel.size()
    with torch.no_grad():
        for name, parameter in _parameters(chunks):
            weight = weights[name]
            slices = [_slice(opened[files[hf]].get_slice(hf), weight.shard, rank, ranks) for hf in weight.hf]
            parameter.copy_(weight.fuse(slices, model.num_query_groups // ranks))


def save_hf(chunks: list[nn.Module], model: ModelConfig, folder: Path | str, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Write the model to `folder`, which transformers loads. Every rank calls it; returns when the folder is there."""
    folder = Path(folder)
    _refuse_occupied(folder)
    tensors = _gather(chunks, model)
    if dist.get_rank() == 0:
        _write(folder, model, tensors, tokenizer)
    dist.barrier()


def random_hf(model: ModelConfig, folder: Path | str, tokenizer_folder: Path | str, seed: int) -> None:
    """A folder of random weights: normal with `init_std`, norms that do nothing yet, no biases. Needs no process group."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    _refuse_occupied(folder)
    family = family_of(model.family)
    generator = torch.Generator().manual_seed(seed)
    neutral = 0.0 if family.zero_centered_norms else 1.0
    tensors = {}
    for name, shape in _shapes(model, family.all_weights(model)).items():
        if len(shape) == 1:
            tensors[name] = torch.full(shape, 0.0 if name.endswith("bias") else neutral)
        else:
            tensors[name] = torch.empty(shape).normal_(0.0, model.init_std, generator=generator)
    _write(folder, model, tensors, AutoTokenizer.from_pretrained(tokenizer_folder))


def _shapes(model: ModelConfig, weights: Iterator[Weight]) -> dict[str, tuple[int, ...]]:
    """HF name -> full shape of every tensor behind `weights`."""
    return {name: shape for weight in weights for name, shape in weight.shapes(model).items()}


def _find_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """HF name -> the file that holds it; InputError unless the folder holds just the tensors of `shapes`."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    files[name] = file
                    found = tuple(tensors.get_slice(name).get_shape())
                    if name in shapes and found != shapes[name]:
                        raise InputError(f"{file}: {name} has shape {found}, the config asks for {shapes[name]}")
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}): download it again") from error
    for names, what in ((shapes.keys() - files.keys(), "is missing"), (files.keys() - shapes.keys(), "is not part of this model")):
        if names:
            raise InputError(f"{folder}: tensor {min(names)} {what} ({len(names)} such): give the safetensors folder of this model")
    return files


def _slice(tensor: object, shard: int | None, rank: int, ranks: int) -> Tensor:
    """Rank's share of a tensor in a safetensors file."""
    if shard is None:
        return tensor[:]
    size = tensor.get_shape()[shard] // ranks
    mine = slice(rank * size, (rank + 1) * size)
    return tensor[mine] if shard == 0 else tensor[:, mine]


def _parameters(chunks: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, layers named by their place in the whole model, counted from 0."""
    for chunk in chunks:
        first = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            stem, layer, rest = re.fullmatch(r"(decoder\.layers\.|)(\d+|)(.*)", name).groups()
            yield f"{stem}{first + int(layer)}{rest}" if stem else name, parameter


def _gather(chunks: list[nn.Module], model: ModelConfig) -> dict[str, Tensor]:
    """HF name -> whole tensor on the CPU of the first rank of each pipeline; nothing of use on the other ranks."""
    groups = chunks[0].pg_collection
    mine = dict(_parameters(chunks))
    weights = [w for w in family_of(model.family).all_weights(model) if not (model.tie_embeddings and w.megatron == "output_layer.weight")]
    stages = groups.pp.size()
    owners = torch.tensor([groups.pp.rank() if w.megatron in mine else stages for w in weights])
    reference = next(iter(mine.values()))
    owners = owners.to(reference.device)
    dist.all_reduce(owners, op=dist.ReduceOp.MIN, group=groups.pp)
    whole = {}
    for weight, owner in zip(weights, owners.tolist(), strict=True):
        shapes = weight.shapes(model)
        parts = weight.split(mine[weight.megatron].detach(), model, groups.tp.size()) if owner == groups.pp.rank() else [None] * len(shapes)
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            if part is not None:
                part = _all_gather(part, weight.shard, groups.tp)
            tensor = _to_first(part, shape, owner, groups.pp, like=reference)
            if tensor is not None:
                whole[name] = tensor.cpu()
    return whole


def _all_gather(part: Tensor, shard: int | None, group: dist.ProcessGroup) -> Tensor:
    """A tensor from the slices that the ranks of `group` hold."""
    if shard is None or group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=shard)


def _to_first(tensor: Tensor | None, shape: tuple[int, ...], owner: int, group: dist.ProcessGroup, like: Tensor) -> Tensor | None:
    """What stage `owner` of the pipeline `group` holds, on its first stage; None on the others."""
    if group.rank() == 0 and owner != 0:
        tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
        dist.recv(tensor, group_src=owner, group=group)
    elif group.rank() == owner != 0:
        dist.send(tensor.contiguous(), group_dst=0, group=group)
    return tensor if group.rank() == 0 else None


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds files already: remove it or choose another output folder")


def _write(folder: Path, model: ModelConfig, tensors: dict[str, Tensor], tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """All files beside `folder` first, then renamed to it."""
    hf = family_of(model.family).to_hf(model)
    hf |= {"torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."), "use_cache": True}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is not None:
        hf |= {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        tokenizer.save_pretrained(partial)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    partial.replace(folder)
