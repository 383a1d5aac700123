"""Hugging Face folder <-> Megatron checkpoint: two stores of the same tensors, streamed from one to the other.

    to_megatron(hf_folder, output, tensor=2, pipeline=2)     output/checkpoints/{latest, step_00000000/} and output/tokenizer/
    to_hf(checkpoint, output, dtype="bfloat16")              sharded safetensors, config, generation config, tokenizer

Neither needs ranks, a GPU or megatron-core. One tensor is written while the next is read: that is all that is in memory. Everything
that names, shapes, types and the config can tell is checked before a byte is written; checksums that the source states are checked
meanwhile, before the output gets its name. A round trip changes no bit, name, type or shape of a tensor.
Any layout reads any layout's checkpoint: `tensor` and `pipeline` say how the tensors are cut into files, so that ranks of that layout
read only what is theirs. Leaves out: the optimizer's state, which Hugging Face has no place for.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_tower.config import InputError, ModelConfig, ParallelConfig
from megatron_tower.data import tokenizer
from megatron_tower.data.sources import sha256
from megatron_tower.models import folder as safetensors
from megatron_tower.models.families import family_of
from megatron_tower.models.folder import SHARD, Folder, Form, raw, word
from megatron_tower.models.hf import open_model
from megatron_tower.models.mapping import Weight, differences
from megatron_tower.runtime.resumable import Plan, Sink, Unit, produce
from megatron_tower.runtime.run_dir import write_text
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import LATEST, MANIFEST, Checkpoint
from megatron_tower.training.torch_dist import METADATA, Reader, ShardWriter, write_metadata

STEP = "checkpoints/step_00000000"
TRAINED = (torch.float32, torch.bfloat16, torch.float16)  # types of weights; others are quantised
T = TypeVar("T")


class Source(Protocol):
    """Weights under their Hugging Face names, one at a time. A `Folder` is one."""

    @property
    def tensors(self) -> Mapping[str, Form]: ...

    def read(self, name: str) -> Tensor: ...


class CheckpointSource:
    """A checkpoint's weights under their Hugging Face names, in the order of the layers; rows that pad the vocabulary are cut.

    Raises InputError when the checkpoint does not hold just the weights of its model, or a file is missing or cut off.
    """

    def __init__(self, found: Checkpoint):
        self.checkpoint, self.model = found, found.model
        self._reader = Reader(found.path)
        self._weights: dict[str, Weight] = {}
        self._parts: dict[str, Tensor] = {}  # of the fused weight that was read last
        self.tensors: dict[str, Form] = {}
        for weight in ordered_weights(self.model):
            name, layer = stacked(weight.megatron)
            self._check(weight, name, layer)
            self.tensors |= {hf: Form(shape, self._reader.tensors[name].dtype) for hf, shape in weight.shapes(self.model).items()}
            self._weights |= dict.fromkeys(weight.hf, weight)
        self.files = self._reader.files(stacked(weight.megatron)[0] for weight in self._weights.values())
        stated = checkpoint.manifest(found.path)["files"]
        for file in self.files | {METADATA}:
            if file not in stated or not (found.path / file).is_file() or (found.path / file).stat().st_size != stated[file]["bytes"]:
                raise InputError(f"checkpoint {found.path}: {file} is missing, cut off or not in {MANIFEST}: use another checkpoint")
        self.sums = {found.path / file: stated[file]["sha256"] for file in sorted(self.files)}
        if sha256(found.path / METADATA) != stated[METADATA]["sha256"]:
            raise InputError(f"checkpoint {found.path}: {METADATA} was changed after it was written: use another checkpoint")

    def read(self, name: str) -> Tensor:
        weight = self._weights[name]
        megatron, layer = stacked(weight.megatron)
        if not weight.per_group:
            rows = [shape[0] for shape in weight.shapes(self.model).values()]
            place = list(weight.hf).index(name)
            return self._reader.read(megatron, layer, slice(sum(rows[:place]), sum(rows[: place + 1])))
        if name not in self._parts:
            parts = weight.split(self._reader.read(megatron, layer), self.model, ranks=1)
            self._parts = dict(zip(weight.hf, parts, strict=True))
        return self._parts.pop(name)

    def _check(self, weight: Weight, name: str, layer: int | None) -> None:
        if name not in self._reader.tensors:
            raise InputError(f"checkpoint {self.checkpoint.path} lacks {name}, which its model has: use another checkpoint")
        found = self._reader.tensors[name].shape
        expected = global_shape(weight, self.model)
        padded = "vocabulary" in next(iter(weight.hf.values())) and found[0] >= expected[0] and found[1:] == expected[1:]
        if not padded and found != (expected if layer is None else (self.model.num_layers, *expected)):
            raise InputError(f"checkpoint {self.checkpoint.path}: {name} has shape {found}, its model asks for {expected} a layer")


def stacked(name: str) -> tuple[str, int | None]:
    """Name of a Megatron parameter in a checkpoint, and its place along the first dimension: weights are stacked over the layers."""
    stem, layer, rest = re.fullmatch(r"(?:(decoder\.layers\.)(\d+)\.)?(.*)", name).groups()
    return (f"{stem}{rest}", int(layer)) if stem else (rest, None)


def ordered_weights(model: ModelConfig) -> list[Weight]:
    """Weights of a model as they follow each other in it; a tied head is the embedding and not named again."""
    weights = [w for w in family_of(model.family).all_weights(model) if not (model.tie_embeddings and w.megatron == "output_layer.weight")]

    def place(weight: Weight) -> float:
        layer = stacked(weight.megatron)[1]
        return layer if layer is not None else -1 if weight.megatron.startswith("embedding.") else math.inf

    return sorted(weights, key=place)


def global_shape(weight: Weight, model: ModelConfig) -> tuple[int, ...]:
    """Shape of a Megatron parameter over all tensor-parallel ranks, in one layer."""
    shapes = list(weight.shapes(model).values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def to_megatron(hf: Path, output: Path, tensor: int = 1, pipeline: int = 1) -> None:
    """Convert a Hugging Face folder to a directory like a phase's. InputError, before anything is written, for what can't be."""
    produce(megatron_plan(hf, output, tensor, pipeline))


def to_hf(path: Path, output: Path, dtype: str | None = None) -> None:
    """Convert a checkpoint, or the newest of a phase directory or run, to a Hugging Face folder. InputError for what can't be."""
    produce(hf_plan(path, output, dtype))


def megatron_plan(hf: Path, output: Path, tensor: int, pipeline: int) -> Plan:
    """What turns a Hugging Face folder into a directory like a phase's, which training starts from. InputError for what can't be."""
    found, model = open_model(hf)
    weights = ordered_weights(model)
    _check_types(found, weights)
    _check_layout(model, weights, tensor, pipeline)
    stages: list[list[Weight]] = [[] for _ in range(pipeline)]
    for weight in weights:
        layer = stacked(weight.megatron)[1]
        after = pipeline - 1 if weight.megatron != weights[0].megatron else 0
        stages[after if layer is None else layer * pipeline // model.num_layers].append(weight)
    units = [
        _checkpoint_unit(found, model, part, tensor, rank=stage * tensor, number=number)
        for stage, of_stage in enumerate(stages)
        for number, part in enumerate(_cut(of_stage, lambda weight: sum(found.tensors[name].nbytes for name in weight.hf)))
    ]

    def finish(partial: Path, facts: dict[str, dict]) -> None:
        step = partial / STEP
        (partial / "tokenizer").mkdir(exist_ok=True)
        tokenizer.carry(hf, partial / "tokenizer")
        write_metadata(step, {Path(name).name: said for name, said in facts.items()})
        files = {Path(name).name: {"bytes": said["bytes"], "sha256": said["sha256"]} for name, said in facts.items()}
        for file in (METADATA, "metadata.json", "common.pt"):
            files[file] = checkpoint.file_facts(step / file)
        layout = asdict(ParallelConfig(f"tp{tensor}_pp{pipeline}", tensor=tensor, pipeline=pipeline))
        told = {"step": 0, "samples": 0, "tokens": 0, "model": asdict(model), "layout": layout, "optimizer": False}
        told |= {"precision": word(found.tensors[next(iter(weights[0].hf))].dtype)}
        checkpoint.write_manifest(step, told, files)
        write_text(step.parent / LATEST, step.name + "\n")

    key = {"source": found.fingerprint(), "tensor": tensor, "pipeline": pipeline}
    return Plan(output, key, units, finish, found.recorded())


def hf_plan(path: Path, output: Path, dtype: str | None) -> Plan:
    """What turns a checkpoint (or the newest of a phase directory or run) into a Hugging Face folder; `dtype`: null keeps each tensor's."""
    found = checkpoint.find(path)
    if found is None:
        raise InputError(f"{path} is no checkpoint and no run with one: give a run, one of its phases or a step_ folder")
    source = CheckpointSource(found)
    return folder_plan(source, output, {"source": checkpoint.fingerprint(found)}, beside_weights(source, dtype), dtype, source.sums)


def beside_weights(source: CheckpointSource, dtype: str | None = None) -> Callable[[Path], None]:
    """What puts config and tokenizer into a checkpoint's export. InputError when the checkpoint has lost them."""
    beside = source.checkpoint.path.parent.parent / "tokenizer"
    if not beside.is_dir():
        raise InputError(f"{beside} is missing, which holds the tokenizer and config of {source.checkpoint.path.name}: put it back")

    def finish(partial: Path) -> None:
        tokenizer.carry(beside, partial)
        stored = word(next(iter(source.tensors.values())).dtype)  # of the first tensor, mostly of all
        write_text(partial / "config.json", _config(beside, source.model, stored, dtype or stored))

    return finish


def folder_plan(
    source: Source,
    output: Path,
    key: dict[str, str],
    finish: Callable[[Path], None],
    dtype: str | None = None,
    sums: dict[Path, str] | None = None,
) -> Plan:
    """What writes the tensors of `source` as a Hugging Face folder, to which `finish` adds config and tokenizer."""
    if dtype is not None and dtype not in [word(known) for known in TRAINED]:
        raise InputError(f"dtype={dtype} is no type of weights: use one of {', '.join(word(known) for known in TRAINED)}")
    forms = {name: Form(form.shape, getattr(torch, dtype) if dtype else form.dtype) for name, form in source.tensors.items()}
    files = safetensors.shards(forms, SHARD)

    def unit(name: str, tensors: dict[str, Form]) -> Unit:
        def fill(sinks: list[Sink]) -> list[dict]:
            (sink,) = sinks
            sink.write(safetensors.header(tensors))
            for tensor in ahead(source.read(name).to(form.dtype).contiguous() for name, form in tensors.items()):
                sink.write(raw(tensor))
            return [{}]

        return Unit({name: sum(form.nbytes for form in tensors.values())}, fill)

    def last(partial: Path, facts: dict[str, dict]) -> None:
        if len(files) > 1:
            write_text(partial / safetensors.INDEX, safetensors.index(files))
        finish(partial)

    return Plan(output, key | {"dtype": dtype}, [unit(name, tensors) for name, tensors in files.items()], last, sums or {})


def ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


@dataclass(frozen=True)
class _Chunk:
    """A rank's part of a tensor of a checkpoint, which has `size` in all."""

    rank: int
    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor


def _checkpoint_unit(found: Folder, model: ModelConfig, weights: list[Weight], ranks: int, rank: int, number: int) -> Unit:
    """The files of one stage's tensor-parallel ranks, of which the first is `rank`, for `weights`."""
    sharded = sum(found.tensors[name].nbytes for weight in weights if weight.shard is not None for name in weight.hf)
    copied = sum(found.tensors[name].nbytes for weight in weights if weight.shard is None for name in weight.hf)
    files = {f"{STEP}/__{rank}_{number}.distcp": sharded // ranks + copied}
    if sharded:
        files |= {f"{STEP}/__{rank + other}_{number}.distcp": sharded // ranks for other in range(1, ranks)}

    def fill(sinks: list[Sink]) -> list[dict]:
        writers = [ShardWriter(sink) for sink in sinks]
        for chunk in ahead(chunk for weight in weights for chunk in _chunks(found, model, weight, ranks)):
            writers[chunk.rank].append(chunk.name, chunk.size, chunk.offsets, chunk.tensor)
        return [writer.facts() for writer in writers]

    return Unit(files, fill)


def _chunks(found: Folder, model: ModelConfig, weight: Weight, ranks: int) -> Iterator[_Chunk]:
    """The chunks that ranks of a layout would save: of query, key and value fused ones, of gate and up two each."""
    if weight.per_group:
        yield from _slices(weight.fuse([found.read(name) for name in weight.hf], model.num_query_groups), 0, weight, model, ranks)
        return
    start = 0
    for name, shape in weight.shapes(model).items():
        yield from _slices(found.read(name), start, weight, model, ranks)  # held by no name here: freed before the next is read
        start += shape[0]


def _slices(block: Tensor, start: int, weight: Weight, model: ModelConfig, ranks: int) -> Iterator[_Chunk]:
    """What each rank has of `block`, which begins at row `start`; of a vocabulary that the ranks do not divide the last has less."""
    name, layer = stacked(weight.megatron)
    size = global_shape(weight, model)
    axis = weight.shard or 0
    width = block.shape[axis] if weight.shard is None else math.ceil(block.shape[axis] / ranks)
    for rank, begin in enumerate(range(0, block.shape[axis], width)):
        part = block.narrow(axis, begin, min(width, block.shape[axis] - begin))
        if part.numel() < block.numel():
            part = part.clone(memory_format=torch.contiguous_format)
        offsets = [start, *[0] * (len(size) - 1)]
        offsets[axis] += begin
        if layer is None:
            yield _Chunk(rank, name, size, tuple(offsets), part)
        else:
            yield _Chunk(rank, name, (model.num_layers, *size), (layer, *offsets), part.unsqueeze(0))


def _cut(items: list[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of `items` of at most SHARD bytes, or one item."""
    part: list[T] = []
    for item in items:
        if part and sum(map(size, part)) + size(item) > SHARD:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _check_types(found: Folder, weights: list[Weight]) -> None:
    """InputError for quantised tensors, and where tensors that become one in a checkpoint are of different types."""
    first: dict[str, str] = {}
    for weight in weights:
        for hf in weight.hf:
            dtype = found.tensors[hf].dtype
            if dtype not in TRAINED:
                raise InputError(f"{found.path}: {hf} is {word(dtype)}: give a folder that is not quantised")
            other = first.setdefault(stacked(weight.megatron)[0], hf)
            if found.tensors[other].dtype != dtype:
                raise InputError(
                    f"{found.path}: {other} is {word(found.tensors[other].dtype)} and {hf} {word(dtype)}, "
                    "which are one tensor in a checkpoint: save the folder with one type"
                )


def _check_layout(model: ModelConfig, weights: list[Weight], tensor: int, pipeline: int) -> None:
    """InputError when ranks cannot share the model so."""
    if not 1 <= pipeline <= model.num_layers or tensor < 1:
        raise InputError(f"tensor={tensor} and pipeline={pipeline}: use 1 or more, and at most the model's {model.num_layers} stages")
    if model.num_query_groups % tensor:
        raise InputError(f"tensor={tensor} does not divide the model's {model.num_query_groups} query groups: use a divisor")
    for weight in weights:
        for name, shape in weight.shapes(model).items():
            if weight.shard is not None and weight.hf[name][weight.shard] != "vocabulary" and shape[weight.shard] % tensor:
                raise InputError(f"tensor={tensor} does not divide {name}, {shape}, along dimension {weight.shard}: use a divisor")


def _config(beside: Path, model: ModelConfig, stored: str, dtype: str) -> str:
    """config.json of a model whose `stored` weights become `dtype`: the base model's text, with what changed laid over it."""
    base = beside / "config.json"
    said = json.loads(base.read_text()) if base.is_file() else {"use_cache": True} | _special_ids(beside)
    key = "dtype" if "dtype" in said else "torch_dtype"
    changed = not base.is_file() or differences(model, family_of(model.family).from_hf(said))
    if not changed and said.get(key, stored) == dtype:
        return base.read_text()
    return json.dumps(said | (family_of(model.family).to_hf(model) if changed else {}) | {key: dtype}, indent=2) + "\n"


def _special_ids(folder: Path) -> dict[str, int | None]:
    """bos_token_id and its like, from the tokenizer's files."""
    said = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    named = {which: said.get(f"{which}_token") for which in ("bos", "eos", "pad")}
    return {f"{which}_token_id": ids.get(token["content"] if isinstance(token, dict) else token) for which, token in named.items()}
