"""Checkpoints on disk: what lies there, what a path means, whether it can be trusted. Imports no megatron-core.

    <phase>/checkpoints/step_00000100/{manifest.json, *.distcp, .metadata, ...}   megatron-core's torch_dist format
    <phase>/checkpoints/latest                                                    name of the newest whole one

`manifest.json` holds step, samples, tokens, the model's shape, the layout of ranks, the sha256 of the data's manifest, and size and
sha256 of every file; it is checked before anything is loaded.
Nothing is unpickled from outside: tensors and `common.pt` are read with `weights_only`, `.metadata` as `training/torch_dist.py` reads it.
Leaves out: writing them (`training/saving.py`), models from them (`training/loading.py`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.data import sources
from megatron_tower.data.manifest import digest
from megatron_tower.data.sources import sha256
from megatron_tower.models.mapping import apart
from megatron_tower.runtime.run_dir import write_text
from megatron_tower.training.torch_dist import METADATA, read_metadata

MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: `step` updates made over `samples` rows and `tokens` tokens, by a model of shape `model`."""

    path: Path
    step: int
    samples: int
    tokens: int
    model: ModelConfig


def latest(phase_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a phase, or None; InputError when `latest` names one that is not there."""
    pointer = phase_dir / "checkpoints" / LATEST
    return read(pointer.parent / pointer.read_text().strip()) if pointer.is_file() else None


def find(path: Path) -> Checkpoint | None:
    """The checkpoint that `path` means: itself, the newest of a phase directory, or of the phase of a run that wrote last."""
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        return read(path)
    pointers = [path / "checkpoints" / LATEST, *path.glob(f"*/checkpoints/{LATEST}")]
    newest = max((p for p in pointers if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)
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
    facts = manifest(path)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), facts["model"]))
    return Checkpoint(path, facts["step"], facts["samples"], facts.get("tokens", 0), model)


def verify(path: Path) -> None:
    """Raise InputError when a file is missing, changed or truncated, or holds more than tensors."""
    refuse(path, problems(path))


def same_architecture(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise InputError when the checkpoint's weights are of another shape than the config's."""
    changed = [f"{name}: {old} -> {new}" for name, (old, new) in apart(checkpoint.model, model).items()]
    if changed:
        raise InputError(
            f"checkpoint {checkpoint.path} is of another architecture ({', '.join(changed)}): choose its model or start afresh"
        )


def fingerprint(start: Checkpoint | Path) -> str:
    """sha256 that tells the weights of a checkpoint, or of a Hugging Face folder, from any other."""
    if isinstance(start, Checkpoint):
        return digest(manifest(start.path))
    return sources.fingerprint(sorted(start.glob("*.safetensors")))


def problems(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, or with every `parts`-th of them; InputError when even its manifest is."""
    files = manifest(path)["files"]
    return [problem for name in list(files)[part::parts] for problem in _problems(path / name, files[name])]


def refuse(path: Path, found: list[str]) -> None:
    """Raise InputError when problems were found."""
    if found:
        raise InputError(f"checkpoint {path}: {', '.join(found)}: use another one ({path.parent}/{LATEST} names the one that is read)")


def manifest(path: Path) -> dict:
    """All that a checkpoint says of itself but its own checksum; InputError when that is missing or was changed."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"checkpoint {path} has no {MANIFEST}: it is no checkpoint or was not written to its end; use another one")
    try:
        facts = json.loads(file.read_text())
        stated = facts.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        stated, facts = "", {}
    if stated != digest(facts):
        raise InputError(f"checkpoint {path}: {MANIFEST} was changed after it was written: use another checkpoint")
    return facts


def write_manifest(path: Path, told: dict, files: dict[str, dict]) -> None:
    """The last file of a checkpoint: what it says of itself, and the `file_facts` of the others."""
    told = told | {"files": dict(sorted(files.items()))}
    write_text(path / MANIFEST, json.dumps(told | {"sha256": digest(told)}, indent=1))


def file_facts(file: Path) -> dict:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def degrees(layout: dict) -> str:
    """The degrees of a manifest's layout that are more than one, as `tensor 2, data 4`; empty for one rank."""
    return ", ".join(f"{name} {n}" for name, n in layout.items() if n is True or (isinstance(n, int) and n > 1))


def _problems(file: Path, expected: dict) -> Iterator[str]:
    if not file.is_file():
        yield f"{file.name} is missing"
    elif file.stat().st_size != expected["bytes"]:
        yield f"{file.name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
    elif sha256(file) != expected["sha256"]:
        yield f"{file.name} was changed after it was written (its sha256 differs)"
    elif file.name == METADATA:
        try:
            read_metadata(file.parent)
        except InputError as error:
            yield str(error)
