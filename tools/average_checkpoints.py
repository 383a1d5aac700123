"""Interpolate the weights of Hugging Face folders, tensor by tensor: merged = sum_i weight_i * checkpoint_i.

    python -m tools.average_checkpoints exported/sft exported/grpo --output merged
    python -m tools.average_checkpoints exported/sft exported/grpo --weights 0.3 0.7 --output merged

Arithmetic is in float32 and each tensor keeps its type. The output has the first folder's shards, config and tokenizer, and appears
whole or not at all. In memory are two tensors of the inputs at a time, and one shard of the output. Leaves out: checkpoints of a run
(export them first: python -m tools.convert_megatron_to_hf), quantised weights with separate scales.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_tower.config import InputError, refuse

FREE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")  # say nothing about the architecture
COPIED = ("*.json", "*.model", "*.txt", "*.jinja")  # config, tokenizer, shard index


@dataclass(frozen=True)
class Tensors:
    """A Hugging Face folder's tensors. files: name -> shard; forms: name -> (shape, type)."""

    folder: Path
    files: dict[str, Path]
    forms: dict[str, tuple[tuple[int, ...], str]]

    @classmethod
    def of(cls, folder: Path) -> "Tensors":
        """Reads headers only; raises InputError for what is no folder of safetensors."""
        index = folder / "model.safetensors.index.json"
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        shards = sorted({folder / shard for shard in wanted.values()} or folder.glob("*.safetensors"))
        if not shards or not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} has no config.json with safetensors beside it: give a Hugging Face folder, "
                "and export a run with python -m tools.convert_megatron_to_hf first"
            )
        files, forms = {}, {}
        for shard in shards:
            try:
                with safe_open(shard, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        part = opened.get_slice(name)
                        files[name], forms[name] = shard, (tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, FileNotFoundError) as error:
                raise InputError(f"{shard} is damaged or missing ({error}): write or download it again") from error
        if missing := wanted.keys() - files.keys():
            raise InputError(f"{folder} lacks {len(missing)} tensors of its index, {min(missing)} among them: complete the folder")
        return cls(folder, files, forms)


def average(folders: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Write the weighted sum of `folders` to `output`. Raises InputError before anything is written."""
    if len(folders) < 2 or len(weights) != len(folders):
        raise InputError(f"{len(folders)} folders and {len(weights)} weights: give two folders or more, and a weight for each")
    if not abs(math.fsum(weights) - 1) < 1e-6:
        raise InputError(f"the weights {', '.join(map(str, weights))} add up to {math.fsum(weights):g}: they must add up to 1")
    if output.exists():
        raise InputError(f"{output} is there already: choose another --output or remove it")
    inputs = [Tensors.of(folder) for folder in folders]
    for other in inputs[1:]:
        _check_alike(inputs[0], other)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as aside:
        part = Path(aside) / output.name
        part.mkdir()
        for shard in sorted(set(inputs[0].files.values())):
            names = [name for name, file in inputs[0].files.items() if file == shard]
            save_file({name: _sum(name, inputs, weights) for name in names}, part / shard.name, metadata={"format": "pt"})
        for pattern in COPIED:
            for file in folders[0].glob(pattern):
                shutil.copy(file, part)
        part.rename(output)


def _sum(name: str, inputs: Sequence[Tensors], weights: Sequence[float]) -> torch.Tensor:
    """The merged tensor, in the type of the inputs."""
    total = None
    for tensors, weight in zip(inputs, weights, strict=True):
        with safe_open(tensors.files[name], framework="pt") as shard:
            tensor = shard.get_tensor(name)
        total = tensor.float() * weight if total is None else total.add_(tensor.float(), alpha=weight)
    return total.to(tensor.dtype)


def _check_alike(first: Tensors, other: Tensors) -> None:
    """Raise InputError where two folders are not the same architecture, tensor by tensor."""
    a, b = (json.loads((tensors.folder / "config.json").read_text(encoding="utf-8")) for tensors in (first, other))
    ours = {key for key in a.keys() | b.keys() if key not in FREE and not key.endswith("_token_id")}
    if differing := sorted(key for key in ours if a.get(key) != b.get(key)):
        raise InputError(
            f"{first.folder} and {other.folder} differ in {', '.join(differing)} of config.json: give folders of one architecture"
        )
    if lone := sorted(first.forms.keys() ^ other.forms.keys()):
        raise InputError(f"{lone[0]} and {len(lone) - 1} more tensors are in only one of {first.folder} and {other.folder}")
    for name, form in first.forms.items():
        if form != other.forms[name]:
            raise InputError(f"{name} is {form} in {first.folder} and {other.forms[name]} in {other.folder}: save both alike")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="Hugging Face folders, two or more")
    parser.add_argument("--weights", type=float, nargs="+", help="one a folder; equal ones if not given")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    count = len(arguments.folders)
    try:
        average(arguments.folders, arguments.weights or [1 / count] * count, arguments.output)
    except InputError as error:
        refuse(error)
    print(f"{' + '.join(map(str, arguments.folders))} -> {arguments.output}")


if __name__ == "__main__":
    main()
