"""Prove that a Megatron checkpoint and a Hugging Face folder are the same model: logits in float32, ours beside transformers'.

    python -m tools.verify_conversion --hf gemma-2-2b --checkpoint converted                            # HF -> Megatron
    python -m tools.verify_conversion --hf exported --checkpoint runs/mine/sft --parallel single tp2 pp2   # Megatron -> HF
    python -m tools.verify_conversion --hf Qwen2.5-72B --checkpoint converted --by-layer                  # larger than memory

Prompts are a few texts, where the folder has a tokenizer, and random tokens, shorter and longer than the sliding window. Writes
conversion.json and conversion.md beside `checkpoints/`. Exit code 1: logits differ by more than the tolerance, relative to their standard
deviation (by layer: activations, relative to their length), or the two configs do; 2: bad input.
Leaves out: data-parallel copies, virtual pipelines.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_tower.command import refuse
from megatron_tower.config import CONF, ClusterConfig, Config, InputError, ModelConfig, ParallelConfig
from megatron_tower.config import check as check_config
from megatron_tower.data import tokenizer
from megatron_tower.models.folder import Folder
from megatron_tower.models.hf import open_model
from megatron_tower.models.mapping import differences
from megatron_tower.plan import parameters
from megatron_tower.runtime import cpu, distributed
from megatron_tower.runtime.local import run_ranks
from megatron_tower.runtime.run_dir import write_text
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import Checkpoint
from megatron_tower.training.verify import FP32, Difference, Part, Work

TEXTS = (
    "Good morning! Where does the train to Lisbon leave from, and how long does it take?",
    "Am 12. März 2024 floss der Fluss ruhig unter der alten Brücke hindurch; niemand sah hin.",
    "今天天气很好，我们去公园散步吧。",
)
SHORT, LONG = 24, 160  # random tokens; LONG of models without a window
BEYOND = 64  # tokens that the longest prompt has more than the window
SAME = ("family", "num_layers", "hidden_size", "vocab_size")  # else there is nothing to compare
PACKAGES = ("torch", "transformers", "megatron-core")


@dataclass
class Report:
    """What was found. apart: fields in which the configs differ; layouts: name -> prompt -> difference; parts: of a comparison by layer."""

    hf: str
    checkpoint: str
    step: int
    sha256: str  # of the checkpoint
    tolerance: float
    prompts: dict[str, int]  # name -> tokens
    apart: list[str]
    layouts: dict[str, dict[str, Difference]] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})

    @property
    def worst(self) -> float:
        """The largest relative difference of logits, or of a part's activations; NaN when any is."""
        found = self.parts or [difference for prompts in self.layouts.values() for difference in prompts.values()]
        return torch.tensor([one.relative for one in found], dtype=torch.float64).max().item()

    @property
    def agrees(self) -> bool:
        return not self.apart and self.worst <= self.tolerance

    @property
    def verdict(self) -> str:
        """One sentence."""
        told = f"{'the same model' if self.agrees else 'NOT the same model'}: largest relative difference of "
        if self.parts:
            told += f"a part {self.worst:.1e} ({max(self.parts, key=lambda part: (math.isnan(part.relative), part.relative)).name})"
        else:
            told += f"logits {self.worst:.1e}"
        told += f", {self.tolerance:.0e} allowed"
        if self.apart:
            told += f"; the configs differ in {', '.join(self.apart)}"
        if not self.agrees and not self.parts:
            told += "; --by-layer tells a wrong layer from rounding that many layers amplify"
        return told

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table."""
        if self.parts:
            return ["part", "largest difference", "relative"], [[p.name, f"{p.maximum:.1e}", f"{p.relative:.1e}"] for p in self.parts]
        head = ["layout", "prompt", "tokens", "largest difference", "relative", "mean", "same next token", "largest KL, nats"]
        return head, [
            [
                layout,
                prompt,
                str(self.prompts[prompt]),
                f"{d.maximum:.1e}",
                f"{d.relative:.1e}",
                f"{d.mean:.1e}",
                f"{d.argmax:.1%}",
                f"{d.kl:.1e}",
            ]
            for layout, found in self.layouts.items()
            for prompt, d in found.items()
        ]


def verify(hf: Path, path: Path, names: list[str], tolerance: float, by_layer: bool) -> Report:
    """Compare, and write the report beside the checkpoint. `names`: files of conf/parallel. InputError for what can't be compared."""
    (folder, model), start = open_model(hf), checkpoint.find(path)
    if start is None:
        raise InputError(
            f"--checkpoint {path} holds no checkpoint: name a converted folder, a run, a phase of it or one of its checkpoints"
        )
    _refuse_another_model(hf, model, start)
    layouts = [layout(name, start.model) for name in names]
    prompts = dict(_prompts(hf, model))
    report = Report(
        str(hf),
        str(start.path),
        start.step,
        checkpoint.fingerprint(start),
        tolerance,
        {name: len(ids) for name, ids in prompts.items()},
        differences(start.model, model),
    )
    if by_layer or not _fits(start.model, max(report.prompts.values())):
        report.parts = _by_layer(folder, start, prompts)
    else:
        report.layouts = _whole(hf, start, prompts, layouts)
    _write(report, start.path.parent.parent)
    return report


def _refuse_another_model(hf: Path, model: ModelConfig, start: Checkpoint) -> None:
    unlike = [
        f"{key} {getattr(model, key)} and {getattr(start.model, key)}" for key in SAME if getattr(model, key) != getattr(start.model, key)
    ]
    if unlike:
        raise InputError(f"{hf} and {start.path} are different models ({', '.join(unlike)}): name the folder it was made from or became")


def layout(name: str, model: ModelConfig) -> ParallelConfig:
    """A file of conf/parallel, one copy of the model. InputError when the model can't be laid out like that."""
    file = CONF / "parallel" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        raise InputError(f"--parallel {name} is no layout of conf/parallel: use some of {known}")
    parallel = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ParallelConfig), OmegaConf.load(file)))
    if parallel.virtual_pipeline:
        raise InputError(f"--parallel {name} has a virtual pipeline, which only trains: use one without")
    cluster = ClusterConfig(name="local")
    check_config(Config(model=replace(model, hf_folder=None), parallel=parallel, precision=FP32, cluster=cluster))
    return replace(parallel, data=1)


def _prompts(hf: Path, model: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """Name and token ids: random ones, the longest beyond the window, and texts, none longer than the model's context."""
    generator = torch.Generator().manual_seed(0)
    for count in (min(SHORT, model.sliding_window), model.sliding_window + BEYOND) if model.window_layers else (SHORT, LONG):
        count = min(count, model.max_position_embeddings)
        yield f"random {count}", torch.randint(model.vocab_size, (count,), generator=generator).tolist()
    if (hf / "tokenizer.json").is_file():
        for number, ids in enumerate(tokenizer.load(hf)(list(TEXTS))["input_ids"], start=1):
            yield f"text {number}", ids[: model.max_position_embeddings]


def _fits(model: ModelConfig, longest: int) -> bool:
    """Whether the model and the logits of its longest prompt, in float32, take no more than half of the free memory."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    needed = 4 * (parameters(model) + longest * model.vocab_size)
    if needed > free / 2:
        print(f"the model takes {needed / 1e9:.1f} GB in float32 and {free / 1e9:.1f} GB are free: comparing layer by layer, on one rank")
    return needed <= free / 2


def _whole(hf: Path, start: Checkpoint, prompts: dict[str, list[int]], layouts: list[ParallelConfig]) -> dict[str, dict[str, Difference]]:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        work.expect(hf, prompts)
        torch.cuda.empty_cache()  # what transformers had is the ranks' now
        for parallel in layouts:
            work.plan(start.path, parallel)
        for ranks in sorted({parallel.world_size for parallel in layouts}):
            together = [parallel.name for parallel in layouts if parallel.world_size == ranks]
            threads = distributed.threads_per_rank(ClusterConfig(name="local"), ranks)
            if code := run_ranks(["megatron_tower.training.verify", folder, *together], ranks, threads, work.folder / "logs"):
                sys.exit(code)
        return {parallel.name: work.differences(parallel.name) for parallel in layouts}


def _by_layer(folder: Folder, start: Checkpoint, prompts: dict[str, list[int]]) -> list[Part]:
    cpu.install()
    from megatron_tower.training import verify_layers

    checkpoint.verify(start.path)
    distributed.initialize(ParallelConfig(name="single"), seed=0, cluster=ClusterConfig(name="local"))
    found = verify_layers.parts(folder, start, prompts)
    silent = not Console().is_terminal
    told = list(track(found, "comparing", total=start.model.num_layers + 2, transient=True, disable=silent))
    distributed.shutdown()
    return told


def _write(report: Report, folder: Path) -> None:
    head, rows = report.rows()
    lines = [f"# {report.verdict}", "", f"{report.hf} (transformers) and {report.checkpoint} (Megatron), float32", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    lines += ["", ", ".join(f"{name} {number}" for name, number in report.versions.items()), ""]
    write_text(folder / "conversion.json", json.dumps({"agrees": report.agrees, "worst": report.worst} | asdict(report), indent=1) + "\n")
    write_text(folder / "conversion.md", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder: what the checkpoint was made from, or became")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a converted folder, a run, a phase of it or a checkpoint")
    parser.add_argument("--parallel", nargs="+", default=["single"], metavar="LAYOUT", help="files of conf/parallel (default: single)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the relative difference (default: 1e-4)")
    parser.add_argument("--by-layer", action="store_true", help="also for a model that fits in memory")
    arguments = parser.parse_args()
    try:
        report = verify(arguments.hf, arguments.checkpoint, arguments.parallel, arguments.tolerance, arguments.by_layer)
    except InputError as error:
        refuse(error)
    head, rows = report.rows()
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(report.verdict)
    sys.exit(0 if report.agrees else 1)


if __name__ == "__main__":
    main()
