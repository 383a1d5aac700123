"""Hugging Face folders as they lie on disk: what is read of them, and one sentence for each way they can be wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tower.config import InputError
from megatron_tower.models import folder as folders
from megatron_tower.models.folder import INDEX, Folder, Form, check_tensors, header, index, raw, shards
from tests.unit import hf_folders
from tests.unit.hf_folders import MODELS

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_folders.write(tmp_path / "hf", MODELS["qwen2"])


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in hf_folders.tensors_of(folder).items()}


def test_reads_what_safetensors_reads(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders, "BLOCK", 500)  # several blocks a tensor
    opened, expected = Folder.open(folder), hf_folders.tensors_of(folder)
    assert opened.tensors.keys() == expected.keys() and opened.config["model_type"] == "qwen2"
    for name, tensor in expected.items():
        assert (opened.tensors[name].shape, opened.tensors[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert hf_folders.same_bits({name: opened.read(name)}, {name: tensor})
        assert hf_folders.same_bits({name: opened.read(name, slice(3, 20))}, {name: tensor[3:20]})
        if tensor.dim() == 2:
            assert hf_folders.same_bits({name: opened.read(name, columns=slice(5, 17))}, {name: tensor[:, 5:17]})
            assert hf_folders.same_bits({name: opened.read(name, slice(2, 31), slice(-4, None))}, {name: tensor[2:31, -4:]})


def test_writes_what_safetensors_reads(tmp_path: Path, folder: Path):
    tensors = hf_folders.tensors_of(folder) | {"scalar": torch.tensor(3.0), "flags": torch.tensor([True, False, True])}
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = shards(forms, 20_000)
    for file, part in files.items():
        (tmp_path / file).write_bytes(header(part) + b"".join(raw(tensors[name]) for name in part))
        assert len(part) == 1 or sum(form.nbytes for form in part.values()) <= 20_000
    (tmp_path / INDEX).write_text(index(files))
    (tmp_path / "config.json").write_text("{}")
    assert hf_folders.same_bits(hf_folders.tensors_of(tmp_path), tensors)
    assert Folder.open(tmp_path).tensors.keys() == tensors.keys()
    assert list(shards(forms, 10**9)) == ["model.safetensors"]


def test_checksums_of_a_download(folder: Path, tmp_path: Path):
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    (notes / f"{FIRST}.metadata").write_text(f"0123abc\n{sums[FIRST]}\n1700000000.0\n")
    (notes / f"{SECOND}.metadata").write_text(f"0123abc\n{'a' * 40}\n1700000000.0\n")  # git's sum of a small file
    assert Folder.open(folder).recorded() == {folder / FIRST: sums[FIRST]}
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(".cache"))
    blobs.mkdir()
    (snapshot / SECOND).rename(blobs / sums[SECOND])
    (snapshot / SECOND).symlink_to(blobs / sums[SECOND])
    assert Folder.open(snapshot).recorded() == {snapshot / SECOND: sums[SECOND]}


def test_fingerprint_tells_folders_apart(folder: Path, tmp_path: Path):
    first = Folder.open(folder).fingerprint()
    assert Folder.open(folder).fingerprint() == first
    other = hf_folders.write(tmp_path / "other", MODELS["qwen2"], seed=1)
    assert Folder.open(other).fingerprint() != first
    (folder / FIRST).touch()
    assert Folder.open(folder).fingerprint() != first


def truncated(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-8])


def cut_in_header(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:100])


def header_not_json(folder: Path) -> None:
    whole = bytearray((folder / FIRST).read_bytes())
    whole[8] = 0
    (folder / FIRST).write_bytes(whole)


def header_with_a_hole(folder: Path) -> None:
    said = header({"a": Form((2,), torch.float32), "b": Form((2,), torch.float32)}).replace(b"[8,16]", b"[9,17]")
    (folder / FIRST).write_bytes(said + bytes(17))


def header_says_another_shape(folder: Path) -> None:
    said = header({"a": Form((4,), torch.float32)}).replace(b'"shape":[4]', b'"shape":[3]')
    (folder / FIRST).write_bytes(said + bytes(16))


def header_names_twice(folder: Path) -> None:
    entry = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = f"{{{entry},{entry}}}".encode()
    (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text)


def missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def index_names_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"model.norm.weight": "{FIRST}", '))


def edited(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    said = json.loads((folder / INDEX).read_text())
    change(said["weight_map"])
    (folder / INDEX).write_text(json.dumps(said))


def index_names_what_is_not_there(folder: Path) -> None:
    edited(folder, lambda where: where.update({"model.layers.9.weight": FIRST}))


def index_lacks_one(folder: Path) -> None:
    edited(folder, lambda where: where.pop("model.norm.weight"))


def index_points_outside(folder: Path) -> None:
    edited(folder, lambda where: where.update({"model.norm.weight": "../secret.safetensors"}))


def in_two_shards(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file(load_file(folder / FIRST), folder / "zz.safetensors")


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    "damage, told",
    [
        (truncated, f"{FIRST} has .* bytes, its header speaks of .*: it was cut off or changed"),
        (cut_in_header, f"{FIRST} has a damaged header"),
        (header_not_json, f"{FIRST} has a damaged header"),
        (header_with_a_hole, "damaged header .*b does not begin where"),
        (header_says_another_shape, "damaged header .*shapes and places"),
        (header_names_twice, "damaged header .*names a twice"),
        (missing_shard, rf"{SECOND} is missing \(1 of 3 files"),
        (index_names_twice, rf"{INDEX} cannot be read \(it names model.norm.weight twice\)"),
        (index_names_what_is_not_there, f"{FIRST} lacks model.layers.9.weight, though {INDEX} puts it there"),
        (index_lacks_one, f"holds model.norm.weight, though {INDEX} does not name it"),
        (index_points_outside, "no weight_map of files beside it"),
        (in_two_shards, f"is in {FIRST} and in .*zz.safetensors"),
        (only_pickles, "pytorch_model.bin is a pickle.*convert the folder to safetensors first"),
        (no_weights, "holds no .*safetensors"),
        (no_config, "config.json cannot be read"),
        (broken_config, "config.json cannot be read"),
        (config_is_a_list, "config.json is not a JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_sentence_for_each_damage(folder: Path, damage: Callable[[Path], None], told: str):
    damage(folder)
    with pytest.raises(InputError, match=told) as raised:
        Folder.open(folder)
    assert "\n" not in str(raised.value)


def test_a_file_cut_while_it_is_read(folder: Path):
    opened = Folder.open(folder)
    truncated(folder)
    last = max((stored for stored in opened.tensors.values() if stored.file.name == FIRST), key=lambda stored: stored.offset)
    with pytest.raises(InputError, match="became shorter"):
        opened.read(next(name for name, stored in opened.tensors.items() if stored == last))


def test_tensors_must_be_those_of_the_model(folder: Path):
    opened, shapes = Folder.open(folder), shapes_of(folder)
    assert check_tensors(opened, shapes) == opened
    for changed, told in (
        (shapes | {"model.extra.weight": (3,)}, "model.extra.weight is missing"),
        ({name: shape for name, shape in shapes.items() if name != "model.norm.weight"}, "model.norm.weight is not part of this model"),
        (shapes | {"model.embed_tokens.weight": (102, 32)}, r"embed_tokens.weight has shape \(101, 32\), the config asks for \(102, 32\)"),
    ):
        with pytest.raises(InputError, match=told):
            check_tensors(opened, changed)


def test_what_old_folders_repeat_is_left_out(tmp_path: Path):
    path = hf_folders.write(tmp_path / "hf", MODELS["qwen2_tied"], files=1)
    tensors, shapes = hf_folders.tensors_of(path), shapes_of(path)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(3) for layer in range(4)}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | buffers | head, path / "model.safetensors")
    told: list[str] = []
    opened = Folder.open(path)
    kept = check_tensors(opened, shapes, told.append)
    assert kept == replace(opened, tensors={name: opened.tensors[name] for name in shapes})
    assert len(told) == 2 and "inv_freq and 3 more" in told[0] and "lm_head.weight is left out" in told[1]
    head["lm_head.weight"].view(torch.int16)[-1, -1] += 1
    save_file(tensors | head, path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        check_tensors(Folder.open(path), shapes)
