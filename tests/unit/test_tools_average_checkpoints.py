"""Interpolation of weights: its arithmetic, what it holds in memory, what it copies and what it refuses."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tower.config import InputError
from tools import average_checkpoints
from tools.average_checkpoints import average

SHAPES = {"embed.weight": (64, 16), "layers.0.weight": (16, 16), "layers.1.weight": (16, 16), "norm.weight": (16,)}
SHARDS = {
    "embed.weight": "model-00001-of-00002.safetensors",
    "layers.0.weight": "model-00001-of-00002.safetensors",
    "layers.1.weight": "model-00002-of-00002.safetensors",
    "norm.weight": "model-00002-of-00002.safetensors",
}


def write(folder: Path, seed: int, dtype: torch.dtype = torch.float32, sharded: bool = True, **config: object) -> Path:
    """A folder of random tensors, in one shard or two."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    for file in set(SHARDS.values()) if sharded else {"model.safetensors"}:
        save_file({n: t for n, t in tensors.items() if not sharded or SHARDS[n] == file}, folder / file, metadata={"format": "pt"})
    if sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": SHARDS}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "hidden_size": 16, "_name_or_path": str(folder)} | config))
    (folder / "tokenizer.json").write_text(json.dumps({"written by": folder.name}))
    (folder / "optimizer.pt").write_bytes(b"not to be copied")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.5, -0.75, 0.25)])
def test_equals_a_float64_average(tmp_path: Path, dtype: torch.dtype, weights: tuple[float, ...]):
    folders = [write(tmp_path / f"in{i}", i, dtype, sharded=i != 1) for i in range(len(weights))]
    average(folders, weights, tmp_path / "out")
    inputs, found = [tensors_of(folder) for folder in folders], tensors_of(tmp_path / "out")
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        naive = sum(weight * one[name].double() for weight, one in zip(weights, inputs, strict=True))
        assert tensor.dtype == dtype
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}  # half a unit
        torch.testing.assert_close(tensor.double(), naive, **tolerance)


def test_the_output_is_laid_out_as_the_first(tmp_path: Path):
    folders = [write(tmp_path / "sft", 0), write(tmp_path / "rl", 1, sharded=False)]
    average(folders, (0.5, 0.5), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*SHARDS.values(), "model.safetensors.index.json", "config.json", "tokenizer.json"}
    assert set(load_file(tmp_path / "out" / SHARDS["norm.weight"])) == {"layers.1.weight", "norm.weight"}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"written by": "sft"}
    assert {path.name for path in tmp_path.iterdir()} == {"sft", "rl", "out"}, "something was left beside the output"


def test_holds_two_input_tensors_and_one_output_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [write(tmp_path / f"in{i}", i) for i in range(3)]
    read: list[weakref.ref] = []
    most = {"inputs": 0, "outputs": 0}
    opened, saved = average_checkpoints.safe_open, average_checkpoints.save_file

    class Watched:
        """A shard whose tensors are counted while somebody holds them."""

        def __init__(self, *words: object, **named: object) -> None:
            self.shard = opened(*words, **named)

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *error: object) -> None:
            self.shard.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self.shard.get_tensor(name)
            read.append(weakref.ref(tensor))
            most["inputs"] = max(most["inputs"], sum(reference() is not None for reference in read))
            return tensor

        def __getattr__(self, name: str) -> object:
            return getattr(self.shard, name)

    def save(tensors: dict[str, torch.Tensor], *words: object, **named: object) -> None:
        most["outputs"] = max(most["outputs"], len(tensors))
        saved(tensors, *words, **named)

    monkeypatch.setattr(average_checkpoints, "safe_open", Watched)
    monkeypatch.setattr(average_checkpoints, "save_file", save)
    average(folders, (0.5, 0.25, 0.25), tmp_path / "out")
    assert len(read) == 3 * len(SHAPES) and most == {"inputs": 2, "outputs": 2}


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path):
    first, second = write(tmp_path / "sft", 0), write(tmp_path / "rl", 1)
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    other_type = write(tmp_path / "bf16", 1, torch.bfloat16)
    other_config = write(tmp_path / "wide", 1, hidden_size=32)
    fewer = write(tmp_path / "fewer", 1, sharded=False)
    save_file({"norm.weight": torch.zeros(16)}, fewer / "model.safetensors")
    other_shape = write(tmp_path / "shape", 1, sharded=False)
    save_file({name: torch.zeros(3) for name in SHAPES}, other_shape / "model.safetensors")
    halved = write(tmp_path / "halved", 1)
    (halved / SHARDS["norm.weight"]).unlink()
    truncated = write(tmp_path / "truncated", 1, sharded=False)
    (truncated / "model.safetensors").write_bytes((first / SHARDS["norm.weight"]).read_bytes()[:-8])
    there = shutil.copytree(first, tmp_path / "there")
    halves = (0.5, 0.5)
    for folders, weights, output, told in (
        ([first], (1.0,), "out", "1 folders"),
        ([first, second], (1.0,), "out", "1 weights"),
        ([first, second], (0.5, 0.6), "out", "add up to 1.1"),
        ([first, second], (float("nan"), 0.5), "out", "add up to nan"),
        ([first, second], halves, "there", "is there already"),
        ([run, second], halves, "out", "convert_megatron_to_hf"),
        ([first, tmp_path / "nowhere"], halves, "out", "nowhere has no config.json"),
        ([first, other_type], halves, "out", "F32.*BF16"),
        ([first, other_config], halves, "out", "differ in hidden_size"),
        ([first, fewer], halves, "out", "embed.weight and 2 more tensors"),
        ([first, other_shape], halves, "out", r"\(64, 16\).*\(3,\)"),
        ([first, halved], halves, "out", "damaged or missing"),
        ([first, truncated], halves, "out", "damaged or missing"),
    ):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(InputError, match=told):
            average(folders, weights, tmp_path / output)
        assert {path.name for path in tmp_path.iterdir()} == before
    assert tensors_of(there).keys() == SHAPES.keys()
