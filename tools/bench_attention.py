"""Attention alone, inside our module: one layer of Gemma 2 (soft-cap, heads of 256) and of Qwen 2.5, packed in three ways, every back end.

The back ends that the machine offers take turns (A B C A B C ...), so that a busy card slows all; a figure is the median over the turns.
First each is compared with eager in float32: one that is wrong is not timed. TFLOP/s count the pairs of tokens that see each other,
4 x pairs x heads x dim forward and 2.5 times that backward. Not run yet on a card.

Run:  python -m tools.bench attention [--json runs/attention.json]       # on a CPU add --tokens 512
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tower.checks import ATTENTION_BACKENDS
from megatron_tower.config import InputError
from megatron_tower.models.attention import CoreAttention
from megatron_tower.models.packing import Packing, pack
from megatron_tower.runtime.distributed import device

HEAD = (
    "| layer | packed as | back end | forward, ms | forward + backward, ms | TFLOP/s | of the ceiling | error |\n"
    + "|---|---|---|---:|---:|---:|---:|---:|"
)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # of the outputs and of each gradient, relative to eager in float32


@dataclass(frozen=True)
class Shape:
    heads: int
    groups: int
    dim: int
    softcap: float | None


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds; tflops of forward and backward; error: the largest of output and gradients, relative."""

    layer: str
    packed: str
    backend: str
    forward: float
    both: float
    tflops: float
    error: float


SHAPES = {"gemma2_2b": Shape(8, 4, 256, 50.0), "qwen25_1.5b": Shape(12, 2, 128, None)}


def core(backend: str, shape: Shape, window: int | None, dtype: torch.dtype, deterministic: bool = False) -> CoreAttention:
    """One layer's attention. InputError when `backend` is not installed or can't serve."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.heads * shape.dim,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.dim,
        softmax_scale=shape.dim**-0.5,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=deterministic,
    )
    asked = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "cp_comm_type": None, "pg_collection": None}
    return CoreAttention(config, 1, backend=backend, softcap=shape.softcap, window=window, window_layers=(0,), **asked)


def inputs(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values [tokens, heads or groups, dim] and the output's gradient [tokens, heads * dim]: the same at every call."""
    generator = torch.Generator(device()).manual_seed(0)
    sizes = [(shape.heads, shape.dim), (shape.groups, shape.dim), (shape.groups, shape.dim), (shape.heads * shape.dim,)]
    *qkv, upstream = (torch.randn(tokens, *size, generator=generator, device=device()).to(dtype) for size in sizes)
    return [x.requires_grad_() for x in qkv], upstream


def results(attention: CoreAttention, qkv: list[Tensor], upstream: Tensor, packing: Packing | None) -> list[Tensor]:
    """The output and the gradients of queries, keys and values; without a packing they are rows, [seq, batch, heads, dim]."""
    out = attention(*qkv, None, packed_seq_params=packing)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance, |a - b| / |b| over a whole tensor."""
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))


def cases(tokens: int) -> dict[str, tuple[list[int], int | None]]:
    """How `tokens` are packed: the lengths of the sequences, and the window."""
    ways = {f"{n} x {tokens // n}": ([tokens // n] * n, None) for n in (1, 4, 32)}
    return ways | {f"1 x {tokens}, window {tokens // 2}": ([tokens], tokens // 2)}


def pairs(lengths: list[int], window: int | None) -> int:
    """How many pairs (query, key) see each other."""
    return sum(sum(min(i + 1, window or i + 1) for i in range(length)) for length in lengths)


def compare(name: str, shape: Shape, tokens: int, turns: int, steps: int) -> Iterator[Row | str]:
    """A row a case and back end; first a line for each back end that can't take part. `steps`: passes a turn."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    there = []
    for backend in ATTENTION_BACKENDS[1:]:
        try:
            core(backend, shape, None, dtype)
            there.append(backend)
        except InputError as why:
            yield f"{name}: {why}"
    qkv, upstream = inputs(shape, tokens, dtype)
    for packed, (lengths, window) in cases(tokens).items():
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        expected = results(
            core("eager", shape, window, torch.float32),
            [x.detach().float().requires_grad_() for x in qkv],
            upstream.float(),
            pack(bounds, device()),
        )
        sides, errors = {}, {}
        for backend in there:
            attention, packing = core(backend, shape, window, dtype), pack(bounds, device())
            errors[backend] = error(results(attention, qkv, upstream, packing), expected)
            if not errors[backend] < TOLERANCE[dtype]:
                yield f"{name}, {packed}: {backend} is wrong, {errors[backend]:.1e} from eager in float32, and is not timed"
                continue
            sides[backend] = (_forward(attention, qkv, packing), lambda a=attention, p=packing: results(a, qkv, upstream, p))
        del expected
        seconds = _turns(sides, turns, steps)
        for backend, (forward, both) in seconds.items():
            work = 3.5 * 4 * pairs(lengths, window) * shape.heads * shape.dim
            yield Row(name, packed, backend, 1e3 * forward, 1e3 * both, work / both / 1e12, errors[backend])


def _forward(attention: CoreAttention, qkv: list[Tensor], packing: Packing) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return attention(*qkv, None, packed_seq_params=packing)

    return run


def _turns(sides: dict[str, tuple[Callable, Callable]], turns: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median seconds of one forward pass and of one forward and backward pass of each side, after a turn that warms up."""
    seconds = {backend: ([], []) for backend in sides}
    for turn in range(turns + 1):
        for backend, works in sides.items():
            for kept, work in zip(seconds[backend], works, strict=True):
                took = timed(work, steps)
                if turn:
                    kept.append(took)
    return {backend: tuple(map(statistics.median, kept)) for backend, kept in seconds.items()}


def timed(work: Callable[[], object], steps: int) -> float:
    """Seconds of one call, the mean of `steps` in a row, until the device has finished them."""
    wait = torch.cuda.synchronize if device().type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    wait()
    return (time.perf_counter() - began) / steps


def ceiling(size: int, steps: int) -> float:
    """TFLOP/s of a square matrix product in the dtype that is timed: what the card can do."""
    x = torch.randn(size, size, device=device(), dtype=torch.bfloat16 if device().type == "cuda" else torch.float32)
    timed(lambda: x @ x, steps)
    return 2 * size**3 / timed(lambda: x @ x, steps) / 1e12


def line(row: Row, ceiling: float) -> str:
    """A row of the markdown table that begins with HEAD."""
    times = f"{row.forward:.2f} | {row.both:.2f} | {row.tflops:,.3g} | {100 * row.tflops / ceiling:.0f} %"
    return f"| {row.layer} | {row.packed} | {row.backend} | {times} | {row.error:.1e} |"


def card() -> str:
    """One line on the GPU, its clocks, the commit and the packages."""
    own = str(torch.cuda.get_device_properties(device()).uuid)
    query = ["nvidia-smi", f"--id=GPU-{own}", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
    told = [
        subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
        for words in (query, ["git", "describe", "--always", "--dirty"])
    ]
    there = {d.metadata["Name"]: d.version for d in distributions()}
    names = ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-4")
    packages = ", ".join(f"{name} {there[name]}" for name in names if name in there)
    return f"{torch.cuda.get_device_name()} (clocks and driver {told[0]}), commit {told[1]}; {packages}; bf16"
