"""Interpolation of weights: its arithmetic, what it may start from, what it holds in memory, what it copies and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.models.families import family_of
from megatron_tower.training.convert import ordered_weights, to_megatron
from tools.average_checkpoints import average

SMALL = ModelConfig(
    name="small",
    family="gemma2",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=33,
    max_position_embeddings=64,
    sliding_window=8,
    window_layers=[0],
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for weight in ordered_weights(model) for name, shape in weight.shapes(model).items()}


def write(folder: Path, seed: int, dtype: torch.dtype = torch.float32, sharded: bool = True, model: ModelConfig = SMALL) -> Path:
    """A folder of random tensors, in one shard or two."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(model).items()}
    halves = [dict(list(tensors.items())[:10]), dict(list(tensors.items())[10:])] if sharded else [tensors]
    files = SHARDS if sharded else ("model.safetensors",)
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file, metadata={"format": "pt"})
    if sharded:
        where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(family_of(model.family).to_hf(model) | {"_name_or_path": str(folder)}))
    (folder / "tokenizer.json").write_text(json.dumps({"written by": folder.name}))
    (folder / "optimizer.pt").write_bytes(b"not to be copied")
    return folder


def run(path: Path, *folders: Path) -> Path:
    """A phase with the weights of `folders` as its steps 100, 200, ..., of which the last is the newest."""
    for number, folder in enumerate(folders, start=1):
        to_megatron(folder, path.with_name("once"), tensor=2)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path.with_name("once") / "checkpoints" / "step_00000000").rename(path / "checkpoints" / f"step_{100 * number:08d}")
        shutil.copytree(path.with_name("once") / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
        shutil.rmtree(path.with_name("once"))
        (path / "checkpoints" / "latest").write_text(f"step_{100 * number:08d}\n")
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(found: Path, inputs: list[Path], weights: tuple[float, ...], dtype: torch.dtype, model: ModelConfig = SMALL) -> None:
    """`found` holds the sum in float64 of the folders, to half a unit of its type."""
    result, given = tensors_of(found), [tensors_of(folder) for folder in inputs]
    assert result.keys() == shapes(model).keys()
    for name, tensor in result.items():
        naive = sum(weight * one[name].double() for weight, one in zip(weights, given, strict=True))
        assert tensor.dtype == dtype
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
        torch.testing.assert_close(tensor.double(), naive, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.5, -0.75, 0.25)])
def test_equals_a_float64_average(tmp_path: Path, dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    folders = [write(tmp_path / f"in{i}", i, dtype, sharded=i != 1) for i in range(len(weights))]
    average([str(folder) for folder in folders], weights, tmp_path / "out")
    check(tmp_path / "out", folders, weights, dtype)


def test_runs_steps_and_folders_together(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"in{i}", i, torch.bfloat16) for i in range(4)]
    phase = run(tmp_path / "mine" / "sft", *folders[:3])
    average([f"{phase}@100,300", str(folders[3])], (0.5, 0.2, 0.3), tmp_path / "steps")
    check(tmp_path / "steps", [folders[0], folders[2], folders[3]], (0.5, 0.2, 0.3), torch.bfloat16)
    average([str(folders[3]), str(tmp_path / "mine")], (), tmp_path / "newest")  # of a run, the newest step of its phase
    check(tmp_path / "newest", [folders[3], folders[2]], (0.5, 0.5), torch.bfloat16)
    assert json.loads((tmp_path / "steps" / "tokenizer.json").read_text()) == {"written by": "in2"}  # the phase's


def test_the_output_has_the_config_and_tokenizer_of_the_first(tmp_path: Path) -> None:
    folders = [write(tmp_path / "sft", 0), write(tmp_path / "rl", 1, sharded=False)]
    average([str(folder) for folder in folders], (), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert found == {"model.safetensors", "config.json", "tokenizer.json"}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "sft" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"sft", "rl", "out"}, "something was left beside the output"


def test_a_second_try_finishes_and_a_third_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [str(write(tmp_path / f"in{i}", i)) for i in range(2)]
    average(names, (), tmp_path / "out")
    average(names, (), tmp_path / "out")
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds other files already"):
        average(names, (0.4, 0.6), tmp_path / "out")


# Not ru_maxrss, which a process inherits from the one that started it.
MEMORY = """
import re, sys
from pathlib import Path
from tools import average_checkpoints as tool

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

tool.average_plan(sys.argv[1:-1], (), Path(sys.argv[-1]))
before = peak()
tool.average(sys.argv[1:-1], (), Path(sys.argv[-1]))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_inputs(tmp_path: Path) -> None:
    """A few times the largest tensor, whatever the number of inputs and of layers."""
    model = replace(SMALL, hidden_size=512, ffn_hidden_size=16000, vocab_size=100000, num_attention_heads=8, kv_channels=64)
    folders = [write(tmp_path / f"in{i}", i, torch.bfloat16, model=model) for i in range(3)]
    inputs = [folders[0], *(run(tmp_path / f"run{i}" / "sft", folder) for i, folder in enumerate(folders[1:]))]
    words = [*map(str, inputs), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, check=True)
    check(tmp_path / "out", folders, (1 / 3, 1 / 3, 1 / 3), torch.bfloat16, model)
    largest = 2 * model.vocab_size * model.hidden_size
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 6 * largest, f"{grown / 1e6:.0f} MB, with a largest tensor of {largest / 1e6:.0f} MB"


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first, second = write(tmp_path / "sft", 0), write(tmp_path / "rl", 1)
    phase = run(tmp_path / "run", second)
    other_type = write(tmp_path / "bf16", 1, torch.bfloat16)
    other_config = write(tmp_path / "wide", 1, model=replace(SMALL, hidden_size=32))
    fewer = write(tmp_path / "fewer", 1, sharded=False)
    save_file({"model.norm.weight": torch.zeros(16)}, fewer / "model.safetensors")
    halved = write(tmp_path / "halved", 1)
    (halved / SHARDS[1]).unlink()
    truncated = write(tmp_path / "truncated", 1, sharded=False)
    (truncated / "model.safetensors").write_bytes((first / SHARDS[1]).read_bytes()[:-8])
    damaged = run(tmp_path / "damaged", second)
    (damaged / "checkpoints" / "step_00000100" / "__0_0.distcp").unlink()
    there = shutil.copytree(first, tmp_path / "there")
    halves = (0.5, 0.5)
    for inputs, weights, output, told in (
        ([first], (1.0,), "out", "1 inputs"),
        ([first, second], (1.0,), "out", "1 weights"),
        ([f"{phase}@100", second], (0.5, 0.25, 0.25), "out", "2 inputs and 3 weights"),
        ([first, second], (0.5, 0.6), "out", "add up to 1.1"),
        ([first, second], (float("nan"), 0.5), "out", "add up to nan"),
        ([first, second], halves, "there", "holds other files already"),
        ([first, tmp_path / "nowhere"], halves, "out", "nowhere is neither a Hugging Face folder nor a run"),
        ([first, f"{phase}@100,last"], (), "out", "last is no step"),
        ([first, f"{phase}@300"], halves, "out", "step_00000300 has no manifest.json"),
        ([first, damaged], halves, "out", "__0_0.distcp is missing"),
        ([first, other_type], halves, "out", "is float32 in .*sft and bfloat16 in"),
        ([first, other_config], halves, "out", "differ in hidden_size"),
        ([first, fewer], halves, "out", "is missing"),
        ([first, halved], halves, "out", f"{SHARDS[1]} is missing"),
        ([first, truncated], halves, "out", "cut off"),
    ):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(InputError, match=told):
            average([str(one) for one in inputs], weights, tmp_path / output)
        assert {path.name for path in tmp_path.iterdir()} == before
    assert tensors_of(there).keys() == shapes(SMALL).keys()
