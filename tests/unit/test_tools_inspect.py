"""What a checkpoint and a Hugging Face folder are said to hold, and that damage is found and named."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY, ModelConfig
from megatron_tower.models.hf import random_hf
from megatron_tower.training.convert import to_megatron
from tools import inspect_checkpoint

MODEL = ModelConfig(
    name="hf",
    family="qwen2",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=33,
    max_position_embeddings=64,
    qkv_bias=True,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and, of the same weights, megatron/."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("inspect")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder / "tokenizer")
    random_hf(MODEL, folder / "hf", folder / "tokenizer", seed=1)
    to_megatron(folder / "hf", folder / "megatron", tensor=2)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint", *words])
    with pytest.raises(SystemExit) as ended:
        inspect_checkpoint.main()
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


def test_checkpoint(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, said = run(monkeypatch, capsys, str(made / "megatron"), "--json", "--tensors")
    told = json.loads(said)
    assert code == 0 and told["whole"] and told["checksums"].startswith("verified (5 files)")
    assert told["step"] == 0 and told["layout"]["tensor"] == 2 and not told["optimizer"]
    assert told["tensors"]["decoder.layers.mlp.linear_fc1.weight"] == {"shape": [2, 16, 16], "dtype": "float32"}
    code, said = run(monkeypatch, capsys, str(made / "megatron"), "--tensors")
    assert code == 0 and "tensor 2" in said and "vocabulary 33" in said and "2 x 16 x 16" in said


def test_both_hold_the_same_parameters(made: Path) -> None:
    """The numbers are those of the shape: no padding, nothing twice."""
    from megatron_tower.plan import parameters

    for path in ("hf", "megatron"):
        found = inspect_checkpoint.groups(inspect_checkpoint.inspect(made / path).tensors)
        assert [(g["what"], g["dtype"], g["parameters"]) for g in found] == [("weights", "float32", parameters(MODEL))]


@pytest.mark.parametrize("damage", ["flip", "cut", "metadata"])
def test_damaged_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, damage: str
) -> None:
    to_megatron(made / "hf", tmp_path / "m")
    step = tmp_path / "m/checkpoints/step_00000000"
    file = step / (".metadata" if damage == "metadata" else "__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-10] if damage == "cut" else content)
    code, said = run(monkeypatch, capsys, str(step))
    assert code == 1 and f"damaged: {file.name} " in said
    assert ("weights" in said) == (damage != "metadata")  # what can still be told is told


def test_hf_folder_against_what_the_hub_stated(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, said = run(monkeypatch, capsys, str(made / "hf"))
    assert code == 0 and "no checksums were recorded" in said and "float32" in said
    folder = tmp_path / "hf"
    subprocess.run(["cp", "-r", made / "hf", folder], check=True)
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for stated, expected in ((right, (0, "verified (1 files)")), ("0" * 64, (1, "model.safetensors is not what was downloaded"))):
        (notes / "model.safetensors.metadata").write_text(f"commit\n{stated}\n1.0\n")
        code, said = run(monkeypatch, capsys, str(folder))
        assert code == expected[0] and expected[1] in said


def test_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, said = run(monkeypatch, capsys, str(tmp_path))
    assert code == 2 and "neither a Hugging Face folder nor a run" in said and len(said.strip().splitlines()) == 1


def test_needs_no_megatron() -> None:
    code = "import sys, tools.inspect_checkpoint; sys.exit('megatron' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
