"""Whole training steps and sampling at real sizes on one card, beside transformers, plain megatron-core with Transformer Engine, and vLLM.

A step is forward, backward, clipping and AdamW over `micro_batches` micro-batches. Ours is `Trainer.step` on packed rows; the others have
no packing for Gemma 2 and get whole rows. Sides take turns, ours of every case before the others; each is built anew for a turn, so that
each has the whole card. What fails or does not fit is told as such, and the files are written again after each measurement: a run that
is cut off has lost nothing. model TFLOP/s = tokens/s x (6 N + 6 L d_attn S); the ceiling is a square matrix product in the same run.
Aims are those of docs/benchmarks.md. Not run yet on a card.

Run:  python -m tools.bench gpu [--only gemma2_2b] [--turns 1] [--steps 3] [--json runs/gpu.json] [--markdown runs/gpu.md]
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.data.batch import Batch
from megatron_tower.data.packing import isolated
from megatron_tower.plan import flops_per_token
from megatron_tower.runtime import cpu, distributed
from megatron_tower.runtime.distributed import device
from megatron_tower.runtime.run_dir import write_text
from tools.bench_sampling import SAMPLED, Sampled, dtype, hf_config, sampling

HEAD = (
    "| model | side | rows | tokens/s | model TFLOP/s | of the ceiling | memory, GiB | first loss |\n"
    + "|---|---|---:|---:|---:|---:|---:|---:|"
)
WARM = 2  # steps before the clock starts


@dataclass(frozen=True)
class Case:
    """A model of conf/model with `layers` of its layers (0: all), other than it is in `shape` (Hydra words).

    ours: (name, Hydra words) of each way of ours; theirs: other sides. Each fits a card of 80 GB by the plan (plan.py).
    """

    name: str
    model: str
    ours: tuple[tuple[str, tuple[str, ...]], ...]
    theirs: tuple[str, ...] = ()
    layers: int = 0
    shape: tuple[str, ...] = ()
    seq_length: int = 4096
    micro_batches: int = 8


@dataclass(frozen=True)
class Row:
    """rate: tokens per second, the median over the turns; memory: the most that was allocated, in GiB."""

    model: str
    side: str
    rows: int
    rate: float
    tflops: float
    memory: float
    loss: float


@dataclass(frozen=True, eq=False)
class Side:
    """measure: one turn, which returns what is known after it."""

    model: str
    name: str
    measure: Callable[[], Row | Sampled]


BF16, TENSORWISE, BLOCKWISE, DELAYED = (f"precision={name}" for name in ("bf16", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed"))
TWO, FOUR, MLP = "phase.micro_batch_size=2", "phase.micro_batch_size=4", "parallel.recompute=mlp"
KEPT = "precision.fp8_param_gather=true"
CASES = (
    Case(
        "Gemma-2-2B",
        "gemma2_2b",
        (("bf16", (BF16,)), ("bf16", (BF16, TWO)), ("bf16, MLP recompute", (BF16, TWO, MLP)), ("FP8 tensorwise", (TENSORWISE, TWO))),
        ("eager", "flex_attention", "flex_attention, compiled"),
    ),
    Case(
        "Qwen2.5-1.5B",
        "qwen25_1_5b",
        (("bf16", (BF16, FOUR)), ("FP8 tensorwise", (TENSORWISE, FOUR)), ("FP8 blockwise", (BLOCKWISE, FOUR))),
        ("sdpa", "sdpa, compiled", "megatron-core, bf16", "megatron-core, fp8_tensorwise"),
    ),
    Case(
        "Qwen2.5-72B, 4 layers, small vocabulary",
        "qwen25_72b",
        (
            ("bf16", (BF16, TWO)),
            ("FP8 tensorwise", (TENSORWISE, TWO)),
            ("FP8 tensorwise, weights in FP8", (TENSORWISE, TWO, KEPT)),
            ("FP8 delayed", (DELAYED, TWO)),
        ),
        ("megatron-core, bf16", "megatron-core, fp8_tensorwise", "megatron-core, fp8_delayed"),
        layers=4,
        shape=("model.vocab_size=4096", "model.tie_embeddings=true"),
        micro_batches=1,  # weights are cast again at each step
    ),
    Case("Gemma-2-9B, 14 layers", "gemma2_9b", (("bf16", (BF16,)), ("bf16, MLP recompute", (BF16, TWO, MLP))), layers=14),
)


SAMPLING = ("gemma2_2b", "qwen25_1_5b")


class Documents:
    """Row i: random tokens, packed documents of 64 tokens and more; the same at every call."""

    def __init__(self, cfg: Config, packed: bool = True):
        self.vocabulary, self.tokens, self.packed = cfg.model.vocab_size, cfg.phase.seq_length, packed

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(self.vocabulary, (self.tokens + 1,), generator=generator)
        if not self.packed:
            return Batch(row[None, :-1], row[None, 1:], torch.ones(1, self.tokens), torch.arange(self.tokens)[None])
        cuts = torch.randint(1, max(2, self.tokens // 64), (4,), generator=generator) * 64
        bounds = sorted({0, self.tokens, *(cut for cut in cuts.tolist() if cut < self.tokens)})
        return isolated(row[:-1], row[1:], torch.ones(self.tokens), bounds)


def configure(case: Case, words: tuple[str, ...]) -> Config:
    """A phase of one step's size at a constant learning rate, from random weights."""
    model = [f"model={case.model}", *case.shape]
    if case.layers:
        windowed = [layer for layer in load(model).model.window_layers if layer < case.layers]
        model += [f"model.num_layers={case.layers}", f"model.window_layers={str(windowed).replace(' ', '')}"]
    phase = ["phase=cpt", f"phase.seq_length={case.seq_length}", "phase.train_steps=100", "phase.optimizer.warmup=0"]
    cfg = load([*model, *phase, "parallel.distributed_optimizer=true", *words])
    cfg.phase.global_batch_size = case.micro_batches * cfg.phase.micro_batch_size
    return cfg


def ours(case: Case, words: tuple[str, ...]) -> tuple[Config, Callable[[], float]]:
    """The configuration, and a function that makes one step and returns its loss."""
    from megatron_tower.models.build import build_chunks
    from megatron_tower.training.rounds import RowSource
    from megatron_tower.training.trainer import Trainer

    cfg = configure(case, words)
    trainer = Trainer(cfg, build_chunks(cfg.model, cfg.parallel, cfg.precision), RowSource(cfg, Documents(cfg)), cfg.phase.train_steps)
    return cfg, lambda: trainer.step()["loss"]


def transformers_side(case: Case, how: str) -> tuple[Config, Callable[[], float]]:
    """Pure bf16, one row a micro-batch, fused AdamW; `how`: an attention of transformers, and whether the model is compiled."""
    from transformers import AutoModelForCausalLM

    attention, _, compiled = how.partition(", ")
    cfg = configure(case, (BF16,))
    with device():
        hf = AutoModelForCausalLM.from_config(hf_config(cfg), attn_implementation=attention).to(dtype()).train()
    model = torch.compile(hf) if compiled else hf
    adamw = torch.optim.AdamW(hf.parameters(), lr=cfg.phase.optimizer.lr, fused=device().type == "cuda")
    rows = _batches(cfg)

    def step() -> float:
        total = torch.zeros((), device=device())
        for batch in rows:
            loss = model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss / len(rows)  # it shifts labels itself
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), cfg.phase.optimizer.clip_grad)
        adamw.step()
        adamw.zero_grad()
        return total.item()

    return cfg, step


def plain_megatron(case: Case, precision: str) -> tuple[Config, Callable[[], float]]:
    """GPTModel with the stock layers of Transformer Engine and the stock cross entropy."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_tower.models.build import transformer_config
    from megatron_tower.training.optimizer import build_optimizer
    from megatron_tower.training.trainer import wrap

    rows = next(words for name, words in case.ours if name == "bf16")[1:]
    cfg = configure(case, (f"precision={precision}", *rows))
    model = cfg.model
    gpt = GPTModel(
        transformer_config(model, cfg.parallel, cfg.precision),
        get_gpt_layer_with_transformer_engine_spec(),
        model.vocab_size,
        model.max_position_embeddings,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
    ).to(device())
    chunks = wrap([gpt], cfg)
    optimizer = build_optimizer(chunks, cfg)
    run, rows = get_forward_backward_func(), _batches(cfg)

    def loss(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), {"loss": total.detach()}

    def forward(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, partial]:
        batch = next(batches)
        return chunk(batch.tokens, batch.position_ids, None, labels=batch.labels), partial(loss, batch)

    def step() -> float:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        size, seq = rows[0].tokens.shape
        terms = run(
            forward_step_func=forward, data_iterator=[iter(rows)], model=chunks, num_microbatches=len(rows),
            seq_length=seq, micro_batch_size=size, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        return sum(term["loss"].item() for term in terms) / (len(rows) * size * seq)

    return cfg, step


def _batches(cfg: Config) -> list[Batch]:
    """The micro-batches of a step, without packing."""
    rows, size = Documents(cfg, packed=False), cfg.phase.micro_batch_size
    return [
        Batch.stack([rows[i] for i in range(start, start + size)]).to(device()) for start in range(0, cfg.phase.global_batch_size, size)
    ]


def training(case: Case, steps: int) -> Iterator[Side]:
    """Ours, then the others."""
    for name, words in case.ours:
        yield Side(case.name, f"ours, {name}", partial(_trained, case, f"ours, {name}", partial(ours, case, words), steps, []))
    for name in case.theirs:
        stock, _, precision = name.partition("megatron-core, ")
        told = name if precision else f"transformers, {name}"
        build = partial(plain_megatron, case, precision) if precision else partial(transformers_side, case, stock)
        yield Side(case.name, told, partial(_trained, case, told, build, steps, []))


def _trained(
    case: Case, name: str, build: Callable[[], tuple[Config, Callable[[], float]]], steps: int, found: list[tuple[float, float, float]]
) -> Row:
    """Build, warm up, time; `found`: (seconds a step, GiB, the first loss) of the turns before, to which this one's are added."""
    on_card = device().type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    cfg, step = build()
    first, *_ = [step() for _ in range(WARM)]
    began = time.perf_counter()
    for _ in range(steps):
        step()  # reads the loss: what was launched has ended
    found.append(((time.perf_counter() - began) / steps, torch.cuda.max_memory_allocated() / 2**30 if on_card else 0.0, first))
    seconds, memory, losses = zip(*found, strict=True)
    rate = cfg.phase.global_batch_size * cfg.phase.seq_length / statistics.median(seconds)
    tflops = rate * flops_per_token(cfg.model, cfg.phase.seq_length) / 1e12
    return Row(case.name, name, cfg.phase.micro_batch_size, rate, tflops, max(memory), losses[0])


class Report:
    """What was measured so far, on the screen and in the files asked for."""

    def __init__(self, machine: str, ceiling: float, json_file: Path | None, markdown: Path | None):
        self.machine, self.ceiling, self.json, self.markdown = machine, ceiling, json_file, markdown
        self.found: dict[Side, Row | Sampled] = {}
        self.left_out: dict[Side, str] = {}

    def measure(self, sides: list[Side], turns: int) -> None:
        """All sides in turn, `turns` times; one that fails is not asked again."""
        for side in sides * turns:
            if side in self.left_out:
                continue
            try:
                self.found[side] = side.measure()
                print(self.line(self.found[side]), flush=True)
            except torch.OutOfMemoryError:
                self.left_out[side] = "out of memory"
            except (InputError, ImportError) as error:
                self.left_out[side] = str(error)
            except Exception as error:  # a card's time is short: the others go on
                traceback.print_exc()
                self.left_out[side] = f"{type(error).__name__}: {error}".split("\n")[0]
            if side in self.left_out:
                print(self.missing(side), flush=True)
            self.write()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def missing(self, side: Side) -> str:
        return f"{side.model}: {side.name}: {self.left_out[side]}"

    def rows(self, kind: type) -> list[Row | Sampled]:
        return [row for row in self.found.values() if isinstance(row, kind)]

    def write(self) -> None:
        missing = [self.missing(side) for side in self.left_out]
        trained, sampled = self.rows(Row), self.rows(Sampled)
        if self.markdown:
            tables = [HEAD, *map(self.line, trained), "", SAMPLED, *map(self.line, sampled)]
            write_text(self.markdown, "\n".join([self.machine, "", *tables, "", *missing]) + "\n")
        if self.json:
            told = {"training": list(map(asdict, trained)), "sampling": list(map(asdict, sampled))}
            write_text(self.json, json.dumps({"machine": self.machine, **told, "left_out": missing}, indent=1) + "\n")

    def line(self, row: Row | Sampled) -> str:
        """A row of the table that begins with HEAD or SAMPLED."""
        if isinstance(row, Sampled):
            return f"| {row.model} | {row.side} | {row.rate:,.0f} | {row.lowest:,.0f} - {row.highest:,.0f} |"
        share, told = row.tflops / self.ceiling, f"{row.tflops:,.0f}"
        return f"| {row.model} | {row.side} | {row.rows} | {row.rate:,.0f} | {told} | {share:.0%} | {row.memory:.1f} | {row.loss:.3f} |"


def agenda(models: list[str] | None, steps: int) -> list[Side]:
    """What is measured, what is worth most first: ours of each case and its sampling, then what stands beside them."""
    found = []
    for case in CASES:
        if not models or case.model in models:
            found += training(case, steps)
            if case.model in SAMPLING:
                found += [Side(case.model, *side) for side in sampling(case.model, 64, 128, 512)]
    return sorted(found, key=lambda side: not side.name.startswith("ours"))


def run(options: argparse.Namespace) -> None:
    """InputError without a card."""
    cpu.install()
    from tools import bench_attention  # megatron-core comes after the bridge

    if not torch.cuda.is_available():
        raise InputError("this machine has no CUDA: run it where a GPU is, or python -m tools.bench cpu here")
    cfg = load([])
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    for file in filter(None, (options.json, options.markdown)):
        file.parent.mkdir(parents=True, exist_ok=True)
    ceiling = bench_attention.ceiling(8192, 20)
    report = Report(f"{bench_attention.card()}; {ceiling:,.0f} TFLOP/s in a square matrix product", ceiling, options.json, options.markdown)
    print(report.machine, "", HEAD, sep="\n", flush=True)
    report.measure(agenda(options.only, options.steps), options.turns)
    distributed.shutdown()
