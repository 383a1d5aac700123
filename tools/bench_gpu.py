"""Whole training steps and sampling at real sizes on one card, beside transformers and plain megatron-core with Transformer Engine.

A step is forward, backward, clipping and AdamW over `micro_batches` micro-batches. Ours is `Trainer.step` on packed rows; the others have
no packing for Gemma 2 and get whole rows. Sides take turns; each is built anew for a turn, so that each has the whole card, and what
does not fit is told as such. model TFLOP/s = tokens/s x (6 N + 6 L d_attn S); the ceiling is a square matrix product in the same run.
Aims are those of docs/benchmarks.md. Not run yet on a card.

Run:  python -m tools.bench gpu [--only gemma2_2b] [--json runs/gpu.json] [--markdown runs/gpu.md]
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.data.batch import Batch
from megatron_tower.data.packing import isolated
from megatron_tower.runtime import cpu, distributed
from megatron_tower.runtime.distributed import device

HEAD = (
    "| model | side | rows | tokens/s | model TFLOP/s | of the ceiling | memory, GiB | first loss |\n"
    + "|---|---|---:|---:|---:|---:|---:|---:|"
)
SAMPLED = "| model | side | tokens/s | lowest - highest |\n|---|---|---:|---:|"
WARM = 2  # steps before the clock starts


@dataclass(frozen=True)
class Case:
    """A model of conf/model with `layers` of its layers (0: all). ours: (name, Hydra words) of each way of ours; theirs: other sides."""

    name: str
    model: str
    ours: tuple[tuple[str, tuple[str, ...]], ...]
    theirs: tuple[str, ...] = ()
    layers: int = 0
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


BF16, TENSORWISE, BLOCKWISE, DELAYED = (f"precision={name}" for name in ("bf16", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed"))
TWO, FOUR, MLP = "phase.micro_batch_size=2", "phase.micro_batch_size=4", "parallel.recompute=mlp"
CASES = (
    Case(
        "Gemma-2-2B",
        "gemma2_2b",
        (("bf16", (BF16,)), ("bf16", (BF16, TWO)), ("bf16, MLP recompute", (BF16, TWO, MLP)), ("FP8 tensorwise", (TENSORWISE, TWO))),
        ("eager", "flex_attention", "flex_attention, compiled"),
    ),
    Case("Gemma-2-9B, 16 layers", "gemma2_9b", (("bf16", (BF16,)), ("bf16, MLP recompute", (BF16, TWO, MLP))), layers=16),
    Case(
        "Qwen2.5-1.5B",
        "qwen25_1_5b",
        (("bf16", (BF16, FOUR)), ("FP8 tensorwise", (TENSORWISE, FOUR)), ("FP8 blockwise", (BLOCKWISE, FOUR))),
        ("sdpa", "sdpa, compiled", "megatron-core, bf16", "megatron-core, fp8_tensorwise"),
    ),
    Case(
        "Qwen2.5-72B, 4 layers",
        "qwen25_72b",
        (("bf16", (BF16, TWO)), ("FP8 tensorwise", (TENSORWISE, TWO)), ("FP8 delayed", (DELAYED, TWO))),
        ("megatron-core, bf16", "megatron-core, fp8_tensorwise", "megatron-core, fp8_delayed"),
        layers=4,
        micro_batches=1,  # weights are cast again at each step
    ),
)


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
    model = [f"model={case.model}"]
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
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_tower.models.families import family_of

    attention, _, compiled = how.partition(", ")
    cfg = configure(case, (BF16,))
    hf_config = AutoConfig.for_model(**family_of(cfg.model.family).to_hf(cfg.model))
    on_card = device().type == "cuda"
    dtype = torch.bfloat16 if on_card else torch.float32
    with device():
        hf = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, torch_dtype=dtype).train()
    model = torch.compile(hf) if compiled else hf
    adamw = torch.optim.AdamW(hf.parameters(), lr=cfg.phase.optimizer.lr, fused=on_card)
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


def sides(case: Case) -> dict[str, Callable[[], tuple[Config, Callable[[], float]]]]:
    """Name -> what builds it."""
    found = {f"ours, {name}, {words}": partial(ours, case, words) for name, words in case.ours}
    for name in case.theirs:
        stock, _, precision = name.partition("megatron-core, ")
        found[name if precision else f"transformers, {name}"] = (
            partial(plain_megatron, case, precision) if precision else partial(transformers_side, case, stock)
        )
    return found


def compare(case: Case, turns: int, steps: int) -> Iterator[Row | str]:
    """A row a side, or one line on why it has none."""
    from megatron_tower.plan import flops_per_token

    measured: dict[str, list[tuple[float, float, float]]] = {}
    configs: dict[str, Config] = {}
    why: dict[str, str] = {}
    for _ in range(turns):
        for name, build in sides(case).items():
            if name in why:
                continue
            try:
                configs[name], found = _measured(build, steps)
                measured.setdefault(name, []).append(found)
            except torch.OutOfMemoryError:
                why[name] = "out of memory"
            except (InputError, ImportError) as error:
                why[name] = str(error)
            _free()
    for name in sides(case):
        if name in why:
            yield f"{case.name}: {name}: {why[name]}"
            continue
        cfg = configs[name]
        seconds, memory, losses = zip(*measured[name], strict=True)
        rate = cfg.phase.global_batch_size * cfg.phase.seq_length / statistics.median(seconds)
        tflops = rate * flops_per_token(cfg.model, cfg.phase.seq_length) / 1e12
        side = name.rsplit(", (", 1)[0]
        yield Row(case.name, side, cfg.phase.micro_batch_size, rate, tflops, max(memory), losses[0])


def _measured(build: Callable[[], tuple[Config, Callable[[], float]]], steps: int) -> tuple[Config, tuple[float, float, float]]:
    """The configuration; (seconds a step, GiB, the first loss)."""
    on_card = device().type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    cfg, step = build()
    first, *_ = [step() for _ in range(WARM)]
    began = time.perf_counter()
    for _ in range(steps):
        step()  # reads the loss: what was launched has ended
    seconds = (time.perf_counter() - began) / steps
    return cfg, (seconds, torch.cuda.max_memory_allocated() / 2**30 if on_card else 0.0, first)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sampling(model: str, rows: int, prompt: int, new: int, turns: int) -> Iterator[tuple[str, str, float, float, float]]:
    """(model, side, tokens/s, lowest, highest) of ours and of transformers' `generate`, sampling at temperature 1 from random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_tower.models.build import build_chunks
    from megatron_tower.models.families import family_of
    from megatron_tower.rollout.generate import sample

    on_card = device().type == "cuda"
    cfg = load([f"model={model}", f"precision={'bf16' if on_card else 'fp32'}"])
    decoder = build_chunks(cfg.model, cfg.parallel, cfg.precision)[0]
    with device():
        hf_config = AutoConfig.for_model(**family_of(cfg.model.family).to_hf(cfg.model))
        attention = "eager" if cfg.model.attention_softcap else "sdpa"
        dtype = torch.bfloat16 if on_card else torch.float32
        hf = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, torch_dtype=dtype).eval()
    prompts = torch.randint(8, cfg.model.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(device())
    asked = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def our_turn() -> None:
        sample(decoder, prompts.tolist(), max_new_tokens=new, stop_ids=[], temperature=1.0, batch_size=rows)

    def their_turn() -> None:
        with torch.inference_mode():
            hf.generate(prompts, attention_mask=torch.ones_like(prompts), **asked).tolist()

    turn_of = {"ours": our_turn, f"transformers, {attention}": their_turn}
    rates: dict[str, list[float]] = {name: [] for name in turn_of}
    for _ in range(turns):
        for name, turn in turn_of.items():
            began = time.perf_counter()
            turn()
            rates[name].append(rows * new / (time.perf_counter() - began))
    for name, found in rates.items():
        yield model, name, statistics.median(found), min(found), max(found)


def line(row: Row, ceiling: float) -> str:
    """A row of the table that begins with HEAD; ceiling in TFLOP/s."""
    share, told = row.tflops / ceiling, f"{row.tflops:,.0f}"
    return f"| {row.model} | {row.side} | {row.rows} | {row.rate:,.0f} | {told} | {share:.0%} | {row.memory:.1f} | {row.loss:.3f} |"


def run(options: argparse.Namespace) -> None:
    """Print both tables as they are measured; write them where asked. InputError without a card."""
    cpu.install()
    from tools import bench_attention  # megatron-core comes after the bridge

    if not torch.cuda.is_available():
        raise InputError("this machine has no CUDA: run it where a GPU is, or python -m tools.bench cpu here")
    cfg = load([])
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    ceiling = bench_attention.ceiling(8192, 20)
    told = [f"{bench_attention.card()}; {ceiling:,.0f} TFLOP/s in a square matrix product", "", *HEAD.split("\n")]
    print(*told, sep="\n", flush=True)
    cases = [case for case in CASES if not options.only or case.model in options.only]
    results, left_out = [], []
    for found in (found for case in cases for found in compare(case, options.turns, options.steps)):
        if isinstance(found, str):
            left_out.append(found)
        else:
            results.append(asdict(found))
            told.append(line(found, ceiling))
            print(told[-1], flush=True)
    told += ["", *left_out, "", *SAMPLED.split("\n")]
    print(*told[-4 - len(left_out) :], sep="\n", flush=True)
    sampled = []
    for model in ("gemma2_2b", "qwen25_1_5b"):
        if not options.only or model in options.only:
            for found in sampling(model, 64, 128, 512, options.turns):
                sampled.append(found)
                told.append(f"| {found[0]} | {found[1]} | {found[2]:,.0f} | {found[3]:,.0f} - {found[4]:,.0f} |")
                print(told[-1], flush=True)
        _free()
    if options.markdown:
        options.markdown.write_text("\n".join(told) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": told[0], "training": results, "sampling": sampled, "left_out": left_out}, indent=1))
    distributed.shutdown()
