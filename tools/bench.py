"""Speed beside transformers, in one run on this machine: the same shape, weights, rows, AdamW and number of threads.

Training is a whole step of our trainer (forward, backward, clipping, update) beside the loop that a user of transformers writes;
decoding is greedy, with a cache, beside `generate`. The two sides take turns (A B A B ...), and a ratio is the median over the turns,
so that a busy machine slows both. The first losses and the decoded tokens must agree, or nothing is reported.

Run:  python -m tools.bench cpu [--json runs/bench.json]
      python -m tools.bench rl                                    # WPO beside SFT, the seconds of GRPO (bench_rl.py)
      python -m tools.bench convert --scratch /scratch            # conversion beside cp (bench_convert.py)
      GOMP_SPINCOUNT=20000 python -m tools.bench save             # what a checkpoint costs training (bench_save.py)
      python -m tools.bench attention                             # the attention back ends of this machine (bench_attention.py)
      python -m tools.bench gpu                                   # whole steps at real sizes, sampling: one card (bench_gpu.py)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.data.batch import Batch
from megatron_tower.runtime import cpu, distributed
from megatron_tower.runtime.run_dir import write_text
from tools import bench_convert, bench_gpu, bench_rl, bench_save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_tower.models.build import Decoder
    from megatron_tower.training.trainer import Trainer

SIZES = {  # heads have 64 channels, two query heads share a key; the vocabulary has 4,096 entries and one matrix
    "4M": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768},
    "20M": {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1408},
}
ATTENTION = {"gemma2": "eager", "qwen2": "sdpa"}  # of transformers: its sdpa leaves Gemma's soft-cap out
HEAD = "| model | work | tokens/s, ours | tokens/s, transformers | ratio | lowest - highest |\n|---|---|---:|---:|---:|---:|"
TOLERANCE = 1e-4  # of the first loss


@dataclass(frozen=True)
class Work:
    """How much of each: training rows x tokens, decoding rows x prompt + new tokens, and turns of each side."""

    rows: int = 4
    tokens: int = 256
    decode_rows: tuple[int, ...] = (8, 32)
    prompt: int = 64
    new: int = 64
    steps: int = 2
    turns: int = 5


@dataclass(frozen=True)
class Result:
    """Rates in tokens per second, medians over the turns; `ratio` is the median of ours / theirs, `lowest` and `highest` its range."""

    model: str
    work: str
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float


class Rows:
    """Sample i: random tokens, the same at every call."""

    def __init__(self, cfg: Config):
        self.vocabulary, self.tokens = cfg.model.vocab_size, cfg.phase.seq_length

    def __getitem__(self, index: int) -> Batch:
        row = torch.randint(self.vocabulary, (1, self.tokens + 1), generator=torch.Generator().manual_seed(index))
        return Batch(row[:, :-1], row[:, 1:], torch.ones(1, self.tokens), torch.arange(self.tokens)[None])


def configure(family: str, shape: dict[str, int], work: Work) -> Config:
    """The family's small model in another size, and a phase of `work.rows` x `work.tokens` a step at a constant learning rate."""
    heads = max(2, shape["hidden_size"] // 64)
    model = shape | {"kv_channels": 64, "num_attention_heads": heads, "num_query_groups": heads // 2, "tie_embeddings": "true"}
    if family == "gemma2":
        model["window_layers"] = str(list(range(0, shape["num_layers"], 2))).replace(" ", "")
    phase = {"seq_length": work.tokens, "global_batch_size": work.rows, "micro_batch_size": work.rows, "train_steps": 1000}
    words = [f"model.{k}={v}" for k, v in model.items()] + [f"phase.{k}={v}" for k, v in phase.items()]
    optimizer = ["phase.optimizer.lr=1e-4", "phase.optimizer.schedule=constant", "phase.optimizer.warmup=0"]
    return load(["phase=cpt", f"model=tiny_{family}", *words, *optimizer])


def compare(family: str, size: str, shape: dict[str, int], work: Work) -> Iterator[Result]:
    """Training and decoding of one family at one size. Raises RuntimeError when the two sides do not compute the same."""
    from megatron_tower.plan import parameters
    from megatron_tower.training.rounds import RowSource
    from megatron_tower.training.trainer import Trainer

    cfg, make, theirs = _sides(configure(family, shape, work))
    chunks = make()
    name = f"{family} {size} ({parameters(cfg.model) / 1e6:.1f}M)"
    for rows in work.decode_rows:
        what = f"decode {rows} x ({work.prompt} + {work.new})"
        yield _take_turns(name, what, *_decoders(chunks[0], theirs, rows, work), rows * work.new, work)
    sides = _trainers(Trainer(cfg, chunks, RowSource(cfg, Rows(cfg)), cfg.phase.train_steps), theirs)
    yield _take_turns(name, f"train {work.rows} x {work.tokens}", *sides, work.rows * work.tokens * work.steps, work)


def _sides(cfg: Config) -> "tuple[Config, Callable[[], list[Decoder]], PreTrainedModel]":
    """The config, a function that makes our model, and transformers' model, both with the same random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_tower.models.build import build_chunks
    from megatron_tower.models.families import family_of
    from megatron_tower.models.hf import load_hf

    torch.manual_seed(cfg.seed)
    hf_config = AutoConfig.for_model(**family_of(cfg.model.family).to_hf(cfg.model))
    theirs = AutoModelForCausalLM.from_config(hf_config, attn_implementation=ATTENTION[cfg.model.family])

    def ours() -> "list[Decoder]":
        chunks = build_chunks(cfg.model, cfg.parallel, cfg.precision)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            load_hf(chunks, cfg.model, folder)
        return chunks

    return cfg, ours, theirs


def _trainers(trainer: "Trainer", hf: "PreTrainedModel") -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Two functions that make that many updates and return the first one's loss."""
    cfg = trainer.cfg
    o = cfg.phase.optimizer
    matrices = [p for p in hf.parameters() if p.ndim > 1]
    vectors = [p for p in hf.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon)
    samples = 0

    def their_step() -> float:
        nonlocal samples
        batch = Batch.stack([trainer.source.dataset[samples + i] for i in range(cfg.phase.global_batch_size)])
        samples += cfg.phase.global_batch_size
        logits = hf(input_ids=batch.tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), o.clip_grad)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    hf.train()
    trainer.state.chunks[0].train()
    return _repeated(lambda: trainer.step()["loss"]), _repeated(their_step)


def _repeated(step: Callable[[], float]) -> Callable[[int], float]:
    """A function that makes that many steps and returns the first one's loss."""

    def run(count: int) -> float:
        losses = [step() for _ in range(count)]
        return losses[0]

    return run


def _decoders(model: torch.nn.Module, hf: "PreTrainedModel", rows: int, work: Work) -> tuple[Callable, Callable]:
    """Two functions that decode `rows` prompts greedily and return the new tokens, row by row."""
    from megatron_tower.rollout.generate import generate

    prompts = torch.randint(3, hf.config.vocab_size, (rows, work.prompt), generator=torch.Generator().manual_seed(0))
    greedy = {"max_new_tokens": work.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def ours(_: int) -> list[list[int]]:
        return generate(model, prompts.tolist(), max_new_tokens=work.new, stop_ids=[], batch_size=rows)

    def theirs(_: int) -> list[list[int]]:
        tokens: Tensor = hf.generate(prompts, attention_mask=torch.ones_like(prompts), **greedy)
        return tokens[:, work.prompt :].tolist()

    hf.eval()
    return ours, theirs


def _take_turns(name: str, what: str, ours: Callable, theirs: Callable, tokens: int, work: Work) -> Result:
    """One turn to warm up and compare, then `work.turns` of each side in alternation."""
    ours_first, theirs_first = ours(1), theirs(1)
    same = ours_first == theirs_first if isinstance(ours_first, list) else abs(ours_first - theirs_first) < TOLERANCE
    if not same:
        raise RuntimeError(f"{name}, {what}: the two sides differ ({ours_first} against {theirs_first}), their speed can't be compared")
    seconds: list[tuple[float, float]] = []
    for _ in range(work.turns):
        start = time.perf_counter()
        ours(work.steps)
        middle = time.perf_counter()
        theirs(work.steps)
        seconds.append((middle - start, time.perf_counter() - middle))
    ratios = [b / a for a, b in seconds]
    rates = [tokens / statistics.median(side) for side in zip(*seconds, strict=True)]
    return Result(name, what, *rates, statistics.median(ratios), min(ratios), max(ratios))


def machine() -> str:
    """One line on what it ran on and with."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    busy = f"load average {os.getloadavg()[0]:.1f}"
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads, {busy}; {packages}; fp32"


def line(r: Result) -> str:
    """A row of the markdown table that begins with HEAD."""
    return f"| {r.model} | {r.work} | {r.ours:,.0f} | {r.theirs:,.0f} | {r.ratio:.2f} | {r.lowest:.2f} - {r.highest:.2f} |"


def _on_cpu() -> None:
    """This process as the only rank."""
    cpu.install()
    if torch.cuda.is_available():
        raise InputError("this machine has CUDA, where these would measure something else: set CUDA_VISIBLE_DEVICES= in the environment")
    cfg = load([])
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)


def bench_cpu(options: argparse.Namespace) -> None:
    _on_cpu()
    print(machine(), HEAD, sep="\n\n", flush=True)
    results = []
    for size in options.sizes:
        for family in ATTENTION:
            for result in compare(family, size, SIZES[size], Work(turns=options.turns)):
                print(line(result), flush=True)
                results.append(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}, indent=1) + "\n")
    distributed.shutdown()


def bench_rl_stages(options: argparse.Namespace) -> None:
    """The three tables of bench_rl.py, both families at each size."""
    _on_cpu()
    shapes = [(family, size) for size in options.sizes for family in ATTENTION]
    sides = {f"{family} {size}": _sides(configure(family, SIZES[size], Work())) for family, size in shapes}
    print(machine(), bench_rl.WPO_HEAD, sep="\n\n", flush=True)
    for name, (cfg, make, _) in sides.items():
        print(bench_rl.wpo_line(name, bench_rl.wpo_beside_sft(cfg, make, options.turns)), flush=True)
    print("", bench_rl.GRPO_HEAD, sep="\n", flush=True)
    for name, (cfg, make, _) in sides.items():
        print(bench_rl.grpo_line(name, bench_rl.grpo_split(cfg, make, options.turns)), flush=True)
    print("", HEAD, sep="\n", flush=True)
    what = f"sample {bench_rl.SAMPLED} x ({bench_rl.PROMPT} + {bench_rl.GROUP} x {bench_rl.NEW})"
    tokens = bench_rl.SAMPLED * bench_rl.GROUP * bench_rl.NEW
    for name, (_, make, theirs) in sides.items():
        print(line(_take_turns(name, what, *bench_rl.samplers(make()[0], theirs), tokens, Work(turns=options.turns))), flush=True)
    distributed.shutdown()


def bench_conversion(options: argparse.Namespace) -> None:
    model = bench_convert.sized(load([f"model={options.model}"]).model, options.gigabytes)
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        lines = bench_convert.compare(model, Path(folder))
    print(f"{options.model}, {model.num_layers} layers, bf16", "", bench_convert.HEAD, *lines, sep="\n")


def bench_saving(options: argparse.Namespace) -> None:
    """The table of bench_save.py, both families at each size."""
    _on_cpu()
    print(machine(), bench_save.HEAD, sep="\n\n", flush=True)
    for size in options.sizes:
        for family in ATTENTION:
            cfg, make, _ = _sides(configure(family, SIZES[size], Work()))
            print(bench_save.line(f"{family} {size}", bench_save.measure(cfg, make, Rows(cfg), options.turns)), flush=True)
    distributed.shutdown()


def bench_attentions(options: argparse.Namespace) -> None:
    """The table of bench_attention.py: on the GPU where there is one."""
    cpu.install()
    from tools import bench_attention  # megatron-core comes after the bridge

    on_gpu = torch.cuda.is_available()
    where, steps = (bench_attention.card(), 20) if on_gpu else (machine(), 1)
    ceiling = bench_attention.ceiling(8192 if on_gpu else 512, steps)
    said = f"{where}; {ceiling:,.3g} TFLOP/s in a square matrix product"
    print(said, bench_attention.HEAD, sep="\n\n", flush=True)
    rows, left_out = [], []
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    for name, shape in bench_attention.SHAPES.items():
        for found in bench_attention.compare(name, shape, options.tokens, options.turns, steps):
            if isinstance(found, str):
                left_out.append(found)
            else:
                print(bench_attention.line(found, ceiling), flush=True)
                rows.append(asdict(found))
            if options.json:  # each time: a run may be cut off
                write_text(options.json, json.dumps({"machine": said, "results": rows, "left_out": left_out}, indent=1) + "\n")
    print("", *left_out, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Speed beside transformers, measured in one run.")
    commands = parser.add_subparsers(required=True)
    on_cpu = commands.add_parser("cpu", help="training and decoding of both families on this machine's cores")
    on_cpu.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    on_cpu.add_argument("--turns", type=int, default=Work.turns, help="of each side (default: %(default)s)")
    on_cpu.add_argument("--json", type=Path, help="also write the results there")
    on_cpu.set_defaults(run=bench_cpu)
    of_rl = commands.add_parser("rl", help="a WPO step beside two SFT steps, where GRPO's seconds go, sampling beside transformers")
    of_rl.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    of_rl.add_argument("--turns", type=int, default=Work.turns, help="of each side (default: %(default)s)")
    of_rl.set_defaults(run=bench_rl_stages)
    of_convert = commands.add_parser("convert", help="a checkpoint of true shapes to Megatron and back, beside cp")
    of_convert.add_argument("--model", default="qwen25_72b", help="one of conf/model (default: %(default)s), with as many layers as fit")
    of_convert.add_argument(
        "--gigabytes", type=float, default=15.0, help="of weights (default: %(default)s); the disk needs four times that"
    )
    of_convert.add_argument("--scratch", type=Path, required=True, help="an empty folder on the disk to measure")
    of_convert.set_defaults(run=bench_conversion)
    of_save = commands.add_parser("save", help="what a checkpoint costs training, saved by it or beside it")
    of_save.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    of_save.add_argument("--turns", type=int, default=Work.turns, help="of each way (default: %(default)s)")
    of_save.set_defaults(run=bench_saving)
    of_attention = commands.add_parser("attention", help="one layer's attention on every back end that is installed")
    of_attention.add_argument("--tokens", type=int, default=8192, help="of a packed row, a multiple of 32 (default: %(default)s)")
    of_attention.add_argument("--turns", type=int, default=Work.turns, help="of each back end (default: %(default)s)")
    of_attention.add_argument("--json", type=Path, help="also write the results there")
    of_attention.set_defaults(run=bench_attentions)
    of_gpu = commands.add_parser("gpu", help="training steps at real sizes and sampling on one card")
    of_gpu.add_argument("--only", nargs="+", metavar="MODEL", help="of conf/model")
    of_gpu.add_argument("--turns", type=int, default=2, help="of each side (default: %(default)s)")
    of_gpu.add_argument("--steps", type=int, default=5, help="that a turn is timed for (default: %(default)s)")
    of_gpu.add_argument("--json", type=Path, help="also write the results there")
    of_gpu.add_argument("--markdown", type=Path, help="also write the tables there")
    of_gpu.set_defaults(run=bench_gpu.run)
    options = parser.parse_args()
    try:
        options.run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
