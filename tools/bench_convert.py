"""Conversion beside `cp`: a checkpoint of true shapes, as large as asked for, to Megatron and back, each beside a copy of the same bytes.

Files are out of the page cache when a run begins, and on the disk when it ends: on either side the whole way is timed. The peak is the
resident memory of the command's process, Python and PyTorch included. The tensors that come back must be the ones that went.
Run:  python -m tools.bench convert --model qwen25_72b --gigabytes 15 --scratch /scratch
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_tower.config import ModelConfig
from megatron_tower.models.families import family_of
from megatron_tower.models.folder import SHARD, Folder, Form, header, index, raw, same, shards

BLOCK = 1 << 24  # numbers that all tensors are cut from, each from another place on
OVERHEAD = 500e6  # bytes that a conversion may take besides twice the largest tensor
HEAD = "| direction | GB | s | GB/s | cp, GB/s | ratio | peak, MB | bound, MB |\n|---|---:|---:|---:|---:|---:|---:|---:|"


@dataclass(frozen=True)
class Timed:
    """One process: its seconds and the most memory it held, in bytes."""

    seconds: float
    peak: int


def sized(model: ModelConfig, gigabytes: float) -> ModelConfig:
    """`model` with the fewest layers that make its bf16 weights `gigabytes`, and no more than it has."""
    for layers in range(1, model.num_layers):
        windows = [layer for layer in model.window_layers if layer < layers]
        cut = replace(model, num_layers=layers, window_layers=windows)
        if _size(cut) >= gigabytes * 1e9:
            return cut
    return model


def synthetic(model: ModelConfig, folder: Path) -> int:
    """Write a folder of random bf16 weights, block by block; returns the bytes of its largest tensor."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    rng = random.Random(0)
    forms = _forms(model)
    files = shards(forms, SHARD)
    folder.mkdir(parents=True)
    for file, tensors in files.items():
        with (folder / file).open("wb") as out:
            out.write(header(tensors))
            for form in tensors.values():
                left, start = form.nbytes // 2, rng.randrange(BLOCK)
                while left:
                    piece = block[start : start + left]
                    out.write(raw(piece))
                    left, start = left - len(piece), 0
    (folder / "model.safetensors.index.json").write_text(index(files))
    (folder / "config.json").write_text(json.dumps(family_of(model.family).to_hf(model) | {"torch_dtype": "bfloat16"}))
    return max(form.nbytes for form in forms.values())


def beside_cp(command: Sequence[str], source: Path, scratch: Path) -> tuple[Timed, Timed]:
    """(`command`, a copy of `source`): both begin with cold files and end when theirs are on the disk."""
    copy = scratch / "copy"
    _evict(source)
    copied = _timed(["cp", "-r", str(source), str(copy)], then_sync=copy)
    _run(["rm", "-r", str(copy)])
    _evict(source)
    return _timed([sys.executable, "-m", *command]), copied


def line(direction: str, size: int, largest: int, ours: Timed, copied: Timed) -> str:
    rate, cp = (size / 1e9 / run.seconds for run in (ours, copied))
    memory = f"{ours.peak / 1e6:,.0f} | {(2 * largest + OVERHEAD) / 1e6:,.0f}"
    return f"| {direction} | {size / 1e9:.1f} | {ours.seconds:.0f} | {rate:.2f} | {cp:.2f} | {rate / cp:.2f} | {memory} |"


def compare(model: ModelConfig, scratch: Path) -> list[str]:
    """The table's lines. Raises RuntimeError when a tensor came back changed."""
    hf, megatron, back = (scratch / name for name in ("hf", "megatron", "back"))
    largest = synthetic(model, hf)
    size = _size(model)
    there = beside_cp(["tools.convert_hf_to_megatron", "--hf", str(hf), "--output", str(megatron)], hf, scratch)
    again = beside_cp(["tools.convert_megatron_to_hf", "--checkpoint", str(megatron), "--output", str(back)], megatron, scratch)
    if changed := _differing(Folder.open(hf), Folder.open(back)):
        raise RuntimeError(f"{changed[0]} and {len(changed) - 1} more tensors came back changed")
    return [line("HF -> Megatron", size, largest, *there), line("Megatron -> HF", size, largest, *again)]


def _size(model: ModelConfig) -> int:
    return sum(form.nbytes for form in _forms(model).values())


def _forms(model: ModelConfig) -> dict[str, Form]:
    return {name: Form(shape, torch.bfloat16) for name, shape in family_of(model.family).shapes(model).items()}


def _differing(one: Folder, other: Folder) -> list[str]:
    """Names of tensors that are not the same, or in one folder only."""
    names = sorted(one.tensors.keys() ^ other.tensors.keys())
    return names + [name for name in one.tensors.keys() & other.tensors.keys() if not same(one, name, other, name)]


def _timed(command: Sequence[str], then_sync: Path | None = None) -> Timed:
    began = time.perf_counter()
    peak = _run(command)
    if then_sync:
        _run(["sync", *(str(file) for file in then_sync.rglob("*") if file.is_file())])
    return Timed(time.perf_counter() - began, peak)


def _run(command: Sequence[str]) -> int:
    """Wait for a process; the most memory it held, in bytes, as Linux says until just before its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return peak


def _high_water(pid: int) -> int:
    """Not getrusage's figure, which begins with what the parent held when it forked."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # gone while the process ends
    return int(found[1]) * 1024 if found else 0


def _evict(folder: Path) -> None:
    """Put the folder's files on the disk and out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
