"""megatron-core's `torch_dist` checkpoints read and written tensor by tensor, without ranks, a GPU or megatron-core.

    Reader(folder).read("decoder.layers.mlp.linear_fc1.weight", layer=3, rows=slice(0, 512))     whatever layout wrote it
    ShardWriter(sink).append(name, size, offsets, tensor)                                         one `.distcp`, hashed on the way
    write_metadata(folder, facts)                                                                 what makes the files a checkpoint

A `.distcp` is a row of `torch.save` archives, one a chunk; `.metadata` says which part of which tensor lies where. A layer's weights
are stacked over layers: chunk (layer, row, column) of [layers, rows, columns].
`.metadata` is a pickle by PyTorch's design; it is read here, and only here, by an unpickler that knows no name but those of the classes
that describe tensors. Leaves out: objects in a checkpoint, which are refused; what a checkpoint means (`training/checkpoint.py`).
"""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tower.config import InputError
from megatron_tower.models.folder import Form, word
from megatron_tower.runtime.resumable import Sink
from megatron_tower.runtime.run_dir import write_text

METADATA = ".metadata"
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
HASHED_INLINE = 1 << 16  # bytes below which a thread costs more than the hash


def read_metadata(folder: Path) -> Metadata:
    """What lies where in a checkpoint's files. InputError when `.metadata` is damaged, names what has no place there or holds objects."""
    file = folder / METADATA
    try:
        with file.open("rb") as opened:
            found = _TensorMetadata(opened).load()
        objects = [name for name, entry in found.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)]
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} names {error}, which has no place there") from error
    except (OSError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{file} is damaged or missing ({type(error).__name__})") from error
    if objects:
        raise InputError(f"{file}: {objects[0]} is a pickled object, not a tensor")
    return found


class Reader:
    """The tensors of one checkpoint folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata = read_metadata(folder)
        self.tensors = {name: Form(tuple(t.size), t.properties.dtype) for name, t in self._metadata.state_dict_metadata.items()}

    def files(self, names: Iterable[str]) -> set[str]:
        """The files in which the chunks of these tensors lie."""
        wanted = set(names)
        return {info.relative_path for place, info in self._metadata.storage_data.items() if place.fqn in wanted}

    def read(self, name: str, layer: int | None = None, rows: slice | None = None) -> Tensor:
        """A tensor, one `layer` of a stacked one, or those `rows` of it, put together from its chunks."""
        entry = self._metadata.state_dict_metadata[name]
        wanted = [slice(0, length) for length in entry.size]
        if layer is not None:
            wanted[0] = slice(layer, layer + 1)
        if rows is not None:
            wanted[0 if layer is None else 1] = rows
        whole, filled = None, 0
        for chunk in entry.chunks:
            common = [
                slice(max(want.start, start), min(want.stop, start + length))
                for want, start, length in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(part.start >= part.stop for part in common):
                continue
            found = self._chunk(name, chunk)[_moved(common, chunk.offsets)]
            filled += found.numel()
            if common == wanted:
                whole = found
                break
            if whole is None:
                whole = torch.empty([want.stop - want.start for want in wanted], dtype=found.dtype)
            whole[_moved(common, [want.start for want in wanted])] = found
        if filled != math.prod(want.stop - want.start for want in wanted):
            raise InputError(f"{self.folder}: its files hold only part of {name}: use another checkpoint")
        return whole if layer is None else whole[0]

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise InputError(f"{self.folder / METADATA} does not say in which file {name} lies: use another checkpoint")
        with (self.folder / place.relative_path).open("rb", buffering=0) as file:
            try:
                tensor = torch.load(_Window(file, place.offset, place.length), map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
                raise InputError(f"{self.folder / place.relative_path} is damaged at {name}: use another checkpoint") from error
        if not isinstance(tensor, Tensor) or Form(tensor.shape, tensor.dtype) != Form(chunk.sizes, self.tensors[name].dtype):
            raise InputError(f"{self.folder / place.relative_path} does not hold the {name} that {METADATA} speaks of")
        return tensor


class ShardWriter:
    """One `.distcp`: chunks in, one after the other; facts out."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self._digest = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1)
        self._chunks: list[dict] = []

    def append(self, name: str, size: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> None:
        """Write the part of tensor `name`, of `size` in all, that begins at `offsets`; `tensor` is contiguous and no view of another."""
        start, computes_crc = self._sink.size, torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # nothing reads it, and sha256 is there
        try:
            torch.save(tensor, self)
        finally:
            torch.serialization.set_crc32_options(computes_crc)
        place = {"offsets": offsets, "sizes": list(tensor.shape), "start": start, "length": self._sink.size - start}
        self._chunks.append({"name": name, "dtype": word(tensor.dtype), "size": size, **place})

    def facts(self) -> dict:
        """What `write_metadata` and the manifest need to know of the file."""
        self._hashing.shutdown()
        return {"sha256": self._digest.hexdigest(), "chunks": self._chunks}

    def write(self, data: bytes | memoryview) -> int:
        """What torch.save calls. Long pieces are hashed beside the writing."""
        if len(data) < HASHED_INLINE:
            self._digest.update(data)
            return self._sink.write(data)
        hashed = self._hashing.submit(self._digest.update, data)
        count = self._sink.write(data)
        hashed.result()
        return count

    def flush(self) -> None:
        """torch.save asks for it; the sink sees to it at its end."""


def write_metadata(folder: Path, facts: dict[str, dict]) -> None:
    """Write `.metadata`, `metadata.json` and `common.pt` for files whose `ShardWriter.facts` these are, by name."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for file, said in facts.items():
        for chunk in said["chunks"]:
            properties = TensorProperties(dtype=getattr(torch, chunk["dtype"]))
            entry = tensors.setdefault(chunk["name"], TensorStorageMetadata(properties, torch.Size(chunk["size"]), []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])))
            places[MetadataIndex(chunk["name"], chunk["offsets"])] = _StorageInfo(file, chunk["start"], chunk["length"])
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    write_text(folder / "metadata.json", json.dumps(backends))
    torch.save({}, folder / "common.pt")


class _TensorMetadata(pickle.Unpickler):
    """Reads `.metadata` without letting it name anything but the classes that describe tensors."""

    def find_class(self, module: str, name: str) -> object:
        if name not in SAFE.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Window(io.RawIOBase):
    """Part of a file as a file: what torch.load needs to read one chunk without the rest."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fills `buffer`, or what the window has left for it: torch asks once for a whole tensor, which one read can't bring."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = 0
        while count < len(view) and (more := self._file.readinto(view[count:])):
            count += more
        self._at += count
        return count


def _moved(box: list[slice], origin: Iterable[int]) -> tuple[slice, ...]:
    """A box as seen from `origin`."""
    return tuple(slice(part.start - start, part.stop - start) for part, start in zip(box, origin, strict=True))
