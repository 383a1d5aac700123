"""`torch_dist` files against PyTorch's own reader, and what must not be read."""

import hashlib
import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_tower.config import InputError
from megatron_tower.runtime.resumable import Sink
from megatron_tower.training.torch_dist import METADATA, Reader, ShardWriter, read_metadata, write_metadata

LAYERS, ROWS, COLUMNS = 3, 10, 7


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "stack": torch.randn(LAYERS, ROWS, COLUMNS, generator=generator),
        "half": torch.randn(ROWS, COLUMNS, generator=generator).bfloat16(),
        "large": torch.randn(200, 300, generator=generator),  # beyond what is hashed inline
        "norm": torch.randn(ROWS, generator=generator),
    }


def boxes(row_cuts: list[int], column_cuts: list[int]) -> list[tuple[int, int, int, int]]:
    rows, columns = [0, *row_cuts, ROWS], [0, *column_cuts, COLUMNS]
    return [(a, b, c, d) for a, b in pairwise(rows) for c, d in pairwise(columns)]


def write(folder: Path, row_cuts: list[int] | None = None, column_cuts: list[int] | None = None) -> dict[str, dict]:
    """The tensors in two files, the stacked one and the half one cut into chunks."""
    folder.mkdir()
    files = ["__0_0.distcp", "__1_0.distcp"]
    sinks = [Sink(folder / file, lambda count: None) for file in files]
    writers = [ShardWriter(sink) for sink in sinks]
    parts = tensors()
    for number, (top, bottom, left, right) in enumerate(boxes(row_cuts or [], column_cuts or [])):
        for layer in range(LAYERS):
            chunk = parts["stack"][layer : layer + 1, top:bottom, left:right].clone()
            writers[number % 2].append("stack", (LAYERS, ROWS, COLUMNS), (layer, top, left), chunk)
        writers[number % 2].append("half", (ROWS, COLUMNS), (top, left), parts["half"][top:bottom, left:right].clone())
    for name in ("large", "norm"):
        writers[0].append(name, tuple(parts[name].shape), (0,) * parts[name].dim(), parts[name])
    facts = {file: writer.facts() for file, writer in zip(files, writers, strict=True)}
    for sink in sinks:
        sink.close()
    write_metadata(folder, json.loads(json.dumps(facts)))  # as they come out of the files that keep them
    return facts


@pytest.mark.parametrize("cuts", [([], []), ([5], []), ([], [3]), ([4, 8], [2, 6])], ids=str)
def test_torch_reads_what_is_written(tmp_path: Path, cuts: tuple[list[int], list[int]]):
    facts = write(tmp_path / "checkpoint", *cuts)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    dcp.load(found, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor)
    for file, said in facts.items():
        assert said["sha256"] == hashlib.sha256((tmp_path / "checkpoint" / file).read_bytes()).hexdigest()


@pytest.mark.parametrize("cuts", [([], []), ([5], []), ([], [3]), ([4, 8], [2, 6])], ids=str)
def test_any_rows_of_any_layer_come_back(tmp_path: Path, cuts: tuple[list[int], list[int]]):
    write(tmp_path / "checkpoint", *cuts)
    reader, expected = Reader(tmp_path / "checkpoint"), tensors()
    for name, tensor in expected.items():
        assert reader.tensors[name].shape == tuple(tensor.shape) and reader.tensors[name].dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    for first, last in ((0, ROWS), (0, 5), (3, 9), (9, 10)):
        assert torch.equal(reader.read("half", rows=slice(first, last)), expected["half"][first:last])
        for layer in range(LAYERS):
            assert torch.equal(reader.read("stack", layer, slice(first, last)), expected["stack"][layer, first:last])
    assert reader.files(["norm"]) == {"__0_0.distcp"}


def test_crc_stays_as_it_was(tmp_path: Path):
    write(tmp_path / "checkpoint")
    assert torch.serialization.get_crc32_options()


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_metadata_names_only_what_describes_tensors(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / METADATA
    good = read_metadata(tmp_path / "checkpoint")
    good.planner_data = Evil()
    file.write_bytes(pickle.dumps(good))
    with pytest.raises(InputError, match=r"names .*print, which has no place there"):
        read_metadata(tmp_path / "checkpoint")
    assert "run" not in capsys.readouterr().out
    good.planner_data, good.state_dict_metadata["object"] = None, BytesStorageMetadata()
    file.write_bytes(pickle.dumps(good))
    with pytest.raises(InputError, match=r"BytesStorageMetadata, which has no place"):
        read_metadata(tmp_path / "checkpoint")
    for content in (b"", b"no pickle", pickle.dumps([1]), pickle.dumps(good)[:40]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged or missing|names"):
            read_metadata(tmp_path / "checkpoint")
    file.unlink()
    with pytest.raises(InputError, match="is damaged or missing"):
        read_metadata(tmp_path / "checkpoint")


def test_chunks_must_be_what_the_metadata_says(tmp_path: Path):
    facts = write(tmp_path / "checkpoint", [5])
    folder, half = tmp_path / "checkpoint", next(c for c in facts["__0_0.distcp"]["chunks"] if c["name"] == "half")

    def with_half(**changes: object) -> Reader:
        changed = {file: {"chunks": [c | changes if c == half else c for c in said["chunks"]]} for file, said in facts.items()}
        write_metadata(folder, changed)
        return Reader(folder)

    for changes, told in (
        ({"start": half["start"] + 64}, "is damaged at half"),
        ({"length": 64}, "is damaged at half"),
        ({"sizes": [4, COLUMNS]}, "does not hold the half"),
        ({"dtype": "float32"}, "does not hold the half"),
        ({"name": "other"}, "hold only part of half"),
    ):
        with pytest.raises(InputError, match=told):
            with_half(**changes).read("half")
    reader = with_half()
    for place in reader._metadata.storage_data.values():
        place.relative_path = "../checkpoint/" + place.relative_path
    with pytest.raises(InputError, match="does not say in which file"):
        reader.read("half")
