"""Hugging Face folders in and out of a sharded Megatron model: safetensors, config.json and tokenizer.

    load_hf(chunks, cfg.model, folder)                  each rank reads its own slices
    save_hf(chunks, cfg.model, folder, tokenizer)       gathered over tensor and pipeline ranks, written by rank 0, whole or not at all
    random_hf(cfg.model, folder, tokenizer_folder, seed)

A round trip is bit-identical: the rows of zeros that fill up a vocabulary are cut off. Leaves out: models larger than rank 0's memory
(`tools/convert_megatron_to_hf.py` streams them from a checkpoint), pickled weights, remote code.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.data.tokenizer import load as load_tokenizer
from megatron_tower.models.families import family_of
from megatron_tower.models.folder import SINGLE, Folder, check_tensors, word
from megatron_tower.models.mapping import differences, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def open_model(folder: Path | str) -> tuple[Folder, ModelConfig]:
    """A folder with just the tensors of its model, and that model; no tensor is read. InputError for what is damaged or doesn't fit."""
    opened, model = Folder.open(folder), model_config(folder)
    return check_tensors(opened, family_of(model.family).shapes(model)), model


def load_hf(chunks: list[nn.Module], model: ModelConfig, folder: Path | str) -> None:
    """Fill this rank's part of the model from `folder`. Everything is checked first: InputError names the field or the tensor."""
    folder = Path(folder)
    apart = differences(model, model_config(folder))
    if apart:
        raise InputError(f"model={model.name} and {folder} differ: {'; '.join(apart)}: choose the model config of this folder")
    family = family_of(model.family)
    weights = {weight.megatron: weight for weight in family.all_weights(model)}
    stored = check_tensors(Folder.open(folder), family.shapes(model))
    group = chunks[0].pg_collection.tp
    with torch.no_grad():
        for name, parameter in _parameters(chunks):
            weight = weights[name]
            shares = [stored.read(hf, **_share(shape, weight.shard, group)) for hf, shape in weight.shapes(model).items()]
            fused = weight.fuse(shares, model.num_query_groups // group.size())
            parameter[: len(fused)] = fused
            parameter[len(fused) :] = 0.0


def save_hf(chunks: list[nn.Module], model: ModelConfig, folder: Path | str, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Write the model to `folder`, which transformers loads. Every rank calls it; returns when the folder is there."""
    folder = Path(folder)
    _refuse_occupied(folder)
    dist.barrier()  # the first rank may not write before the last has looked
    tensors = _gather(chunks, model)
    if dist.get_rank() == 0:
        _write(folder, model, tensors, tokenizer)
    dist.barrier()


def random_hf(model: ModelConfig, folder: Path | str, tokenizer_folder: Path | str, seed: int) -> None:
    """A folder of random weights: normal with `init_std`, norms that do nothing yet, no biases. Needs no process group."""
    folder = Path(folder)
    _refuse_occupied(folder)
    family = family_of(model.family)
    generator = torch.Generator().manual_seed(seed)
    neutral = 0.0 if family.zero_centered_norms else 1.0
    tensors = {}
    for name, shape in family.shapes(model).items():
        if len(shape) == 1:
            tensors[name] = torch.full(shape, 0.0 if name.endswith("bias") else neutral)
        else:
            tensors[name] = torch.empty(shape).normal_(0.0, model.init_std, generator=generator)
    _write(folder, model, tensors, load_tokenizer(Path(tokenizer_folder)))


def _share(shape: tuple[int, ...], shard: int | None, group: dist.ProcessGroup) -> dict[str, slice]:
    """Which rows or columns of a tensor are this rank's; of a vocabulary that the ranks do not divide the last have fewer, or none."""
    if shard is None:
        return {}
    share = padded(shape[shard], group.size()) // group.size()
    return {("rows", "columns")[shard]: slice(group.rank() * share, (group.rank() + 1) * share)}


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
                part = _all_gather(part, weight.shard, groups.tp)[: shape[0]]
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
    hf |= {"torch_dtype": word(next(iter(tensors.values())).dtype), "use_cache": True}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is not None:
        hf |= {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        tokenizer.save_pretrained(partial)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / SINGLE, metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    partial.replace(folder)
