"""A Hugging Face folder of safetensors: which tensors it holds, any rows or columns of one, and how such a folder is written.

    folder = Folder.open(path)                                     config.json, the index and the files' headers; no tensor yet
    folder.read("model.embed_tokens.weight", rows=slice(0, 100))

Files are read as files, not through safetensors' memory map, which would keep all that was touched in memory; headers are checked
against file sizes, so what was cut off on its way is met before anything is converted.
Leaves out: pickled weights, which are refused; quantised ones; checksums (`Folder.recorded` names those that the download stated).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_tower.config import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = 5 * 10**9  # bytes of tensors in a file, as transformers cuts them
BLOCK = 32 << 20  # bytes read at once where only columns of a tensor are wanted
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Form:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Form):
    """A tensor in a file, from byte `offset` on."""

    file: Path
    offset: int


@dataclass(frozen=True)
class Folder:
    """tensors: name -> where it lies, in the order of the files; config: config.json parsed."""

    path: Path
    config: dict
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read all but the tensors. InputError for what is missing, damaged, named twice or pickled."""
        path = Path(path)
        config = _json(path / "config.json", "give a Hugging Face model folder")
        tensors: dict[str, Stored] = {}
        for file, names in _shards(path).items():
            found = _header(file)
            if names is not None and names != found.keys():
                name = min(names ^ found.keys())
                where = f"{INDEX} puts it there" if name in names else f"{INDEX} does not name it"
                raise InputError(f"{file} {'lacks' if name in names else 'holds'} {name}, though {where}: download the folder again")
            if both := tensors.keys() & found.keys():
                name = min(both)
                raise InputError(f"{name} is in {tensors[name].file.name} and in {file}: remove the file that does not belong to the model")
            tensors |= found
        return cls(path, config, tensors)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """A tensor, or those rows (first dimension) and columns (second) of it; no more than that is in memory."""
        stored = self.tensors[name]
        with stored.file.open("rb", buffering=0) as file:
            if rows is None and columns is None:
                file.seek(stored.offset)
                return _filled(file, torch.empty(stored.shape, dtype=stored.dtype))
            row = stored.nbytes // stored.shape[0]
            start, stop, _ = (rows or slice(None)).indices(stored.shape[0])
            file.seek(stored.offset + start * row)
            if columns is None:
                return _filled(file, torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype))
            width = len(range(*columns.indices(stored.shape[1])))
            wanted = torch.empty((stop - start, width, *stored.shape[2:]), dtype=stored.dtype)
            for target in wanted.split(max(1, BLOCK // row)):
                target.copy_(_filled(file, torch.empty((len(target), *stored.shape[1:]), dtype=stored.dtype))[:, columns])
            return wanted

    @property
    def files(self) -> list[Path]:
        return sorted({stored.file for stored in self.tensors.values()})

    def fingerprint(self) -> str:
        """Changes when a file is replaced or touched; costs no reading."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def recorded(self) -> dict[Path, str]:
        """File -> the sha256 that the hub stated when huggingface_hub downloaded it, where it did.

        It is noted beside the files of a `--local-dir`, and is the name of the file that a link in the hub's cache leads to.
        """
        sums = {}
        for file in self.files:
            note = self.path / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
            stated = note.read_text().splitlines()[1:2] if note.is_file() else [file.resolve().name]
            if stated and re.fullmatch("[0-9a-f]{64}", stated[0]):  # of large files; that of a small one is git's
                sums[file] = stated[0]
        return sums


def check_tensors(folder: Folder, shapes: dict[str, tuple[int, ...]], tell: Callable[[str], None] = print) -> Folder:
    """`folder` with just the tensors of `shapes`; InputError names one that is missing, unknown or of another shape.

    Rotary frequencies that old Llama folders store, and a head that repeats the embedding it is tied to, are left out and told of.
    """
    frequencies = {name for name in folder.tensors if name.endswith(".rotary_emb.inv_freq")} - shapes.keys()
    if frequencies:
        tell(f"{folder.path}: {min(frequencies)} and {len(frequencies) - 1} more like it are left out: the config says them too")
    left_out = set(frequencies)
    if HEAD in folder.tensors and HEAD not in shapes and EMBEDDING in folder.tensors:
        if not same(folder, HEAD, folder, EMBEDDING):
            raise InputError(
                f"{folder.path}: {HEAD} differs from {EMBEDDING}, though config.json ties them: set tie_word_embeddings to false there"
            )
        tell(f"{folder.path}: {HEAD} is left out: it repeats {EMBEDDING}, to which the config ties it")
        left_out.add(HEAD)
    kept = {name: stored for name, stored in folder.tensors.items() if name not in left_out}
    for names, what in ((shapes.keys() - kept.keys(), "is missing"), (kept.keys() - shapes.keys(), "is not part of this model")):
        if names:
            raise InputError(f"{folder.path}: tensor {min(names)} {what} ({len(names)} such): give the safetensors folder of this model")
    for name, shape in shapes.items():
        if kept[name].shape != shape:
            raise InputError(f"{kept[name].file}: {name} has shape {kept[name].shape}, the config asks for {shape}")
    return replace(folder, tensors=kept)


def shards(tensors: dict[str, Form], limit: int) -> dict[str, dict[str, Form]]:
    """File name -> the tensors that a folder of `tensors` has in it: one file, or several of at most `limit` bytes (or one tensor)."""
    parts: list[dict[str, Form]] = [{}]
    size = 0
    for name, form in tensors.items():
        if parts[-1] and size + form.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = form
        size += form.nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def header(tensors: dict[str, Form]) -> bytes:
    """The beginning of a safetensors file in which `tensors` follow each other."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    said: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, form in tensors.items():
        start, end = end, end + form.nbytes
        said[name] = {"dtype": words[form.dtype], "shape": list(form.shape), "data_offsets": [start, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(files: dict[str, dict[str, Form]]) -> str:
    """The text of `model.safetensors.index.json`."""
    total = sum(form.nbytes for tensors in files.values() for form in tensors.values())
    where = {name: file for file, tensors in files.items() for name in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"


def word(dtype: torch.dtype) -> str:
    """A type as config.json names it."""
    return str(dtype).removeprefix("torch.")


def same(folder: Folder, name: str, other: Folder, its: str) -> bool:
    """Whether tensor `name` of one folder is tensor `its` of another, bit for bit; compared a block of rows at a time."""
    a, b = folder.tensors[name], other.tensors[its]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = max(1, BLOCK * a.shape[0] // a.nbytes)
    blocks = (slice(start, start + step) for start in range(0, a.shape[0], step))
    return all(torch.equal(_bytes(folder.read(name, rows)), _bytes(other.read(its, rows))) for rows in blocks)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return memoryview(_bytes(tensor).numpy())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _filled(file: FileIO, tensor: Tensor) -> Tensor:
    """`tensor` with the next bytes of `file` in it."""
    rest = raw(tensor)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise InputError(f"{file.name} became shorter while it was read: download it again")
        rest = rest[count:]
    return tensor


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files with weights -> the tensors that the index puts there, None without an index."""
    if (path / INDEX).is_file():
        where = _json(path / INDEX, "download it again").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
            raise InputError(f"{path / INDEX} has no weight_map of files beside it: download it again")
        files: dict[Path, set[str] | None] = {path / file: set() for file in sorted(set(where.values()))}
        for name, file in where.items():
            files[path / file].add(name)
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"{missing[0]} is missing ({len(missing)} of {len(files)} files of {INDEX}): download it")
        return files
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if files := sorted(path.glob("*.safetensors")):
        return dict.fromkeys(files)
    if pickled := [file for pattern in PICKLED for file in path.glob(pattern)]:
        raise InputError(f"{pickled[0]} is a pickle, which could run code and is never loaded: convert the folder to safetensors first")
    raise InputError(f"{path} holds no *.safetensors: give a Hugging Face model folder with its weights")


def _header(file: Path) -> dict[str, Stored]:
    """Name -> place, in the order of the bytes. InputError unless the header describes just the bytes that follow it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= min(size, 100_000_000) else b""  # safetensors' own limit
    start = 8 + length
    try:
        said = json.loads(text, object_pairs_hook=_once)
        said.pop("__metadata__", None)
        found = {
            name: Stored(tuple(entry["shape"]), DTYPES[entry["dtype"]], file, start + entry["data_offsets"][0])
            for name, entry in sorted(said.items(), key=lambda item: item[1]["data_offsets"])
        }
        ends = [start + entry["data_offsets"][1] for entry in said.values()]
        whole = all(type(n) is int and n >= 0 for stored in found.values() for n in (*stored.shape, stored.offset))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{file} has a damaged header ({type(error).__name__}: {error}): download it again") from error
    end = start
    for name, stored in found.items():
        if not whole or stored.offset != end:
            raise InputError(f"{file} has a damaged header ({name} does not begin where the one before ends): download it again")
        end += stored.nbytes
    if end != max(ends, default=start):
        raise InputError(f"{file} has a damaged header (shapes and places of its tensors differ): download it again")
    if end != size:
        raise InputError(f"{file} has {size:,} bytes, its header speaks of {end:,}: it was cut off or changed, download it again")
    return found


def _json(file: Path, mend: str) -> dict:
    """A JSON object in which no key comes twice."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): {mend}") from error
    if not isinstance(said, dict):
        raise InputError(f"{file} is not a JSON object: {mend}")
    return said


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError for a key that comes twice, of which Python would keep the last."""
    said = dict(pairs)
    if len(said) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return said
