"""Checkpoints that can be trusted: written aside, checksummed, then made visible in one stroke.

    <phase>/checkpoints/step_00000100/{manifest.json, *.distcp, .metadata, ...}   megatron-core's torch_dist format
    <phase>/checkpoints/latest                                                    name of the newest whole one

`manifest.json` holds step, samples, the model's shape, and size and sha256 of every file; it is checked before anything is loaded.
Nothing is unpickled from outside: tensors and `common.pt` are read with `weights_only`, `.metadata` names only PyTorch's own classes.
Any layout of ranks reads what any other wrote. Leaves out: asynchronous saving.
"""

import json
import math
import os
import pickle
import queue
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from megatron_tower.config import InputError, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data import sources, tokenizer
from megatron_tower.data.manifest import digest
from megatron_tower.data.sources import sha256
from megatron_tower.models.build import Decoder, build_chunks
from megatron_tower.models.hf import load_hf, model_config
from megatron_tower.runtime.distributed import device, is_rank_zero, place
from megatron_tower.runtime.run_dir import write_text
from megatron_tower.training.state import TrainingState, bytes_per_weight, load_model, load_optimizer, sharded_model, sharded_optimizer

MANIFEST = "manifest.json"
LATEST = "latest"
MARGIN = 1.05  # of the tensors' bytes, for headers and metadata
SAFE = {  # all that `.metadata` needs to name
    "torch": {"Size", "float32", "bfloat16", "float16", "uint8", "int64"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        "_MEM_FORMAT_ENCODING",
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: `step` updates made over `samples` rows, by a model of shape `model`."""

    path: Path
    step: int
    samples: int
    model: ModelConfig


def latest(phase_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a phase, or None; InputError when `latest` names one that is not there."""
    pointer = phase_dir / "checkpoints" / LATEST
    return read(pointer.parent / pointer.read_text().strip()) if pointer.exists() else None


def find(path: Path) -> Checkpoint | None:
    """The checkpoint that `path` means: itself, the newest of a phase directory, or of the phase of a run that wrote last."""
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        return read(path)
    pointers = [path / "checkpoints" / LATEST, *path.glob(f"*/checkpoints/{LATEST}")]
    newest = max((p for p in pointers if p.exists()), key=lambda p: p.stat().st_mtime, default=None)
    return latest(newest.parent.parent) if newest else None


def resolve(path: Path, setting: str = "") -> Checkpoint | Path:
    """The weights that `path`, the value of `setting`, means: a Hugging Face folder, else what `find` finds. InputError for neither."""
    if (path / "config.json").is_file():
        return path
    if found := find(path):
        return found
    named = f"{setting}={path}" if setting else str(path)
    raise InputError(
        f"{named} is neither a Hugging Face folder nor a run with a checkpoint: run what comes before, or name one that is there"
    )


def read(path: Path) -> Checkpoint:
    """A checkpoint's manifest; InputError when it is missing or was changed."""
    manifest = _manifest(path)
    return Checkpoint(path, manifest["step"], manifest["samples"], ModelConfig(**manifest["model"]))


def verify(path: Path) -> None:
    """Raise InputError when a file is missing, changed or truncated, or holds more than tensors."""
    _refuse(path, list(_problems(path, _manifest(path)["files"], part=0, parts=1)))


def same_architecture(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise InputError when the checkpoint's weights are of another shape than the config's."""
    free = ("name", "hf_folder", "attention_backend", "init_std")
    old, new = asdict(checkpoint.model), asdict(model)
    changed = [f"{k}: {old[k]} -> {new[k]}" for k in new if k not in free and old[k] != new[k]]
    if changed:
        raise InputError(
            f"checkpoint {checkpoint.path} is of another architecture ({', '.join(changed)}): choose its model or start afresh"
        )


def fingerprint(start: Checkpoint | Path) -> str:
    """sha256 that tells the weights of a checkpoint, or of a Hugging Face folder, from any other."""
    if isinstance(start, Checkpoint):
        return digest(_manifest(start.path))
    return sources.fingerprint(sorted(start.glob("*.safetensors")))


def save(phase_dir: Path, state: TrainingState, model: ModelConfig, keep_last: int) -> Checkpoint:
    """Write `state` as the phase's newest checkpoint and remove all but the `keep_last` newest; every rank must call it.

    Raises InputError, before anything is written, when the disk has too little space.
    """
    folder = phase_dir / "checkpoints"
    final = folder / f"step_{state.step:08d}"
    aside = folder / f".{final.name}.part"
    check_space(phase_dir, state)
    if is_rank_zero():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()  # saving is synchronous: no need for megatron-core's server process (line 54)
    dist_checkpointing.save(_sharded(state, loading=False), str(aside), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    dist.barrier()
    files = _gathered(
        {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(aside.iterdir())[place().rank :: place().world_size]}
    )
    if is_rank_zero():
        manifest = {"step": state.step, "samples": state.samples, "model": asdict(model), "files": dict(sorted(files.items()))}
        write_text(aside / MANIFEST, json.dumps(manifest | {"sha256": digest(manifest)}, indent=1))
        for path in aside.iterdir():
            _fsync(path)
        _fsync(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(folder)
        write_text(folder / LATEST, final.name + "\n")
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return Checkpoint(final, state.step, state.samples, model)


def load(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Verify the checkpoint, then fill the model, and the optimizer where `state` has one; every rank must call it."""
    here = place()
    found = _gathered({here.rank: list(_problems(checkpoint.path, _manifest(checkpoint.path)["files"], here.rank, here.world_size))})
    _refuse(checkpoint.path, [problem for rank in sorted(found) for problem in found[rank]])
    loaded = dist_checkpointing.load(_sharded(state, loading=True), str(checkpoint.path), validate_access_integrity=False)
    load_model(state.chunks, loaded)
    if state.optimizer is not None:
        state.step, state.samples = checkpoint.step, checkpoint.samples
        load_optimizer(state, loaded["optimizer"])


def open_for_inference(
    path: Path, parallel: ParallelConfig, precision: PrecisionConfig
) -> tuple[Decoder, PreTrainedTokenizerFast, ModelConfig]:
    """This rank's part of the trained model, in evaluation mode, its tokenizer and its shape, on initialised ranks.

    `path`: an HF folder, a checkpoint, a phase directory (its newest checkpoint) or a run (the newest of all). InputError for others.
    """
    if parallel.virtual_pipeline:
        raise InputError(f"parallel={parallel.name} has a virtual pipeline, which only trains: use one without to generate or evaluate")
    found = resolve(path)
    if isinstance(found, Checkpoint):
        model, folder = found.model, found.path.parent.parent / "tokenizer"
        (decoder,) = build_chunks(model, parallel, precision)
        load(found, TrainingState([decoder]))
    else:
        model, folder = model_config(found), found
        (decoder,) = build_chunks(model, parallel, precision)
        load_hf([decoder], model, found)
    return decoder.eval(), tokenizer.load(folder), model


def check_space(phase_dir: Path, state: TrainingState) -> None:
    """Raise InputError when the disk of `phase_dir` is too small for a checkpoint of `state`; every rank must call it."""
    own = (t.data for t in nested_values(sharded_model(state.chunks)) if is_main_replica(t.replica_id))
    size = torch.tensor(sum(weight.numel() * bytes_per_weight(weight) for weight in own), device=device())
    dist.all_reduce(size)
    needed = math.ceil(int(size) * MARGIN)
    existing = next(p for p in (phase_dir, *phase_dir.absolute().parents) if p.exists())
    free = _gathered({place().rank: shutil.disk_usage(existing).free})[0]
    if free < needed:
        raise InputError(
            f"a checkpoint of this model takes {needed:,} bytes and {existing} has {free:,} free: "
            "free some space or choose a run_dir on another disk"
        )


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise InputError(f"checkpoint {path}: {', '.join(problems)}: use another one ({path.parent}/{LATEST} names the one that is read)")


def _sharded(state: TrainingState, loading: bool) -> dict:
    tensors: dict = sharded_model(state.chunks)
    if state.optimizer is not None:
        tensors["optimizer"] = sharded_optimizer(state, tensors, loading)
    return tensors


def _manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"checkpoint {path} has no {MANIFEST}: it is no checkpoint or was not written to its end; use another one")
    try:
        manifest = json.loads(file.read_text())
        stated = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        stated, manifest = "", {}
    if stated != digest(manifest):
        raise InputError(f"checkpoint {path}: {MANIFEST} was changed after it was written: use another checkpoint")
    return manifest


def _problems(path: Path, files: dict[str, dict], part: int, parts: int) -> Iterator[str]:
    for name in list(files)[part::parts]:
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != files[name]["bytes"]:
            yield f"{name} has {file.stat().st_size:,} bytes instead of {files[name]['bytes']:,}"
        elif sha256(file) != files[name]["sha256"]:
            yield f"{name} was changed after it was written (its sha256 differs)"
        elif name == ".metadata":
            yield from _unsafe(file)


class _TensorMetadata(pickle.Unpickler):
    """Reads `.metadata`, a pickle by PyTorch's design, without letting it name anything but the classes that describe tensors."""

    def find_class(self, module: str, name: str) -> object:
        if name not in SAFE.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _unsafe(metadata: Path) -> Iterator[str]:
    """What PyTorch's own reader, which unpickles `.metadata` and every object named there, must not be given."""
    try:
        with metadata.open("rb") as file:
            found = _TensorMetadata(file).load()
    except pickle.UnpicklingError as error:
        yield f".metadata names {error}, which has no place there"
        return
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            yield f"{name} is a pickled object, not a tensor"


def _gathered(own: dict) -> dict:
    """The dicts of all ranks in one."""
    parts: list[dict] = [{}] * place().world_size
    dist.all_gather_object(parts, own)
    return {k: v for part in parts for k, v in part.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
