"""Score one checkpoint on the held-out data: task -> prompts -> generations -> (rewards) -> scores -> scores.json, generations.jsonl.

    python -m evaluation.run eval.checkpoint=runs/demo/sft
    python -m evaluation.run eval.checkpoint=runs/demo/sft parallel=tp2
    python -m evaluation.run -m eval.checkpoint=runs/demo/cpt,runs/demo/sft

The checkpoint is a run directory's phase, one checkpoint of it, or a Hugging Face folder; results go to <checkpoint>/evaluation
unless eval.output says otherwise. Does nothing when the same checkpoint was scored on the same data with the same settings.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from evaluation.held_out import Row, read
from evaluation.metrics.bootstrap import Resampling
from evaluation.tasks import TASKS
from evaluation.tasks.task import Answer, Generator, Score, Verdict, Verify
from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.data.sources import fingerprint
from megatron_tower.runtime.job import EVALUATE, supervised
from megatron_tower.runtime.run_dir import write_text

if TYPE_CHECKING:
    from evaluation.generator import MegatronGenerator
    from megatron_tower.config import ModelConfig

VERSION = 2  # of tasks and metrics; raised when the same answers would score otherwise
PROCESSES = 8  # at most, that compute rewards


@dataclass(frozen=True)
class Subject:
    """What is scored. sha256: of a checkpoint's manifest, or of a Hugging Face folder's weights and JSON files.
    phase, step: of a checkpoint that was trained here."""

    path: str
    sha256: str
    phase: str | None
    step: int | None


@dataclass(frozen=True)
class Plan:
    """A checked evaluation. asked: task -> chosen rows; key: tells checkpoint, data and settings from any other."""

    subject: Subject
    asked: dict[str, list[Row]]
    settings: dict[str, Any]
    data_sha256: str
    output: Path

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.subject.sha256, self.data_sha256, self.settings], sort_keys=True).encode()).hexdigest()

    def is_done(self) -> bool:
        path = self.output / "scores.json"
        if not path.is_file():
            return False
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("key") == self.key
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}): remove it") from error


@entry_point
def main(cfg: Config) -> None:
    if supervised(cfg, EVALUATE):
        return
    from megatron_tower.runtime import cpu
    from megatron_tower.runtime.local import relaunch_if_needed

    cpu.install()
    plan = check(cfg)
    if plan.is_done():
        print(f"{plan.output / 'scores.json'} already holds this checkpoint's scores on this data")
    elif not relaunch_if_needed(cfg, EVALUATE, plan.output / "logs"):
        evaluate(cfg, plan)


def check(cfg: Config) -> Plan:
    """Read all that is needed but the weights. Raises InputError for anything missing, malformed or empty."""
    from megatron_tower.data import manifest

    if not cfg.eval.checkpoint:
        raise InputError("eval.checkpoint is not set: name a run directory, one of its checkpoints or a Hugging Face folder")
    data, path = Path(cfg.data.folder), Path(cfg.eval.checkpoint)
    manifest.verify(data)
    return Plan(
        identify(path),
        {task.name: task.choose(read(data / "held_out" / f"{task.name}.jsonl", task.fields), cfg.eval) for task in TASKS},
        {key: value for key, value in asdict(cfg.eval).items() if key not in ("checkpoint", "output", "batch_size")}
        | {"seed": cfg.seed, "version": VERSION},
        fingerprint([data / "manifest.json"]),
        cfg.evaluation_dir,
    )


def evaluate(cfg: Config, plan: Plan) -> None:
    """Score the checkpoint as one of the layout's ranks; rank 0 writes."""
    from megatron_tower.plan import parameters
    from megatron_tower.runtime import distributed

    began = time.monotonic()
    generator, model = _open(cfg, plan.subject)
    seconds = {"open": time.monotonic() - began}
    how = Resampling(cfg.eval.bootstrap_samples, cfg.eval.confidence, cfg.seed)
    with rewards(cfg) as verify:
        scores, prompts, lines = score_tasks(generator, plan.asked, how, seconds, verify)
    result = {
        "key": plan.key,
        "checkpoint": asdict(plan.subject),
        "model": {"name": model.name, "family": model.family, "parameters": parameters(model)},
        "data": {"folder": cfg.data.folder, "manifest_sha256": plan.data_sha256},
        "settings": plan.settings,
        "decoding": {"method": "greedy", "max_new_tokens": cfg.eval.max_new_tokens, "prompts": "chat" if generator.chat else "plain text"},
        "layout": asdict(cfg.parallel),
        "prompts": {name: _described(generator, text) for name, text in prompts.items()},
        "items": {name: len(rows) for name, rows in plan.asked.items()},
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "scores": [_flat(score) for score in scores],
    }
    if distributed.is_rank_zero():
        _write(plan.output, result, lines)
        print(f"{plan.output / 'scores.json'} ({sum(seconds.values()):.0f} s)")
    distributed.shutdown()


def score_tasks(
    generator: Generator, asked: dict[str, list[Row]], how: Resampling, seconds: dict[str, float], verify: Verify
) -> tuple[list[Score], dict[str, str], list[Answer]]:
    """(scores, an example prompt a task with its text as `{field}`, lines of generations.jsonl); adds each task's seconds."""
    scores: list[Score] = []
    prompts: dict[str, str] = {}
    lines: list[Answer] = []
    for task in TASKS:
        began, rows = time.monotonic(), asked[task.name]
        answers = task.ask(generator, rows)
        if task.verify:
            answers = task.verify(rows, answers, verify)
        scores += task.score(rows, answers, how)
        if example := task.prompt(rows[0] | {task.text: f"{{{task.text}}}"}, generator.chat):
            prompts[task.name] = example
        lines += [{"task": task.name, **row, **answer} for row, answer in zip(rows, answers, strict=True)]
        seconds[task.name] = time.monotonic() - began
    return scores, prompts, lines


@contextmanager
def rewards(cfg: Config) -> Iterator[Verify]:
    """The rewards' verdicts on (item, answer), from processes of rank 0, which tells the other ranks."""
    import torch.distributed as dist

    from megatron_tower.rewards.pool import VerifierPool
    from megatron_tower.runtime.distributed import place

    with VerifierPool(min(PROCESSES, os.cpu_count() or 1), cfg.eval.reward_timeout) as pool:

        def verify(answered: list[tuple[Row, str]]) -> Sequence[Verdict]:
            told = [pool.score(answered) if place().rank == 0 else None]
            if place().world_size > 1:
                dist.broadcast_object_list(told, src=0)
            return told[0]

        yield verify


def identify(path: Path) -> Subject:
    """What lies at `path`; raises InputError when it is no checkpoint."""
    from megatron_tower.training import checkpoint

    found = checkpoint.resolve(path, "eval.checkpoint")
    if isinstance(found, Path):
        files = sorted([*found.glob("*.safetensors"), *found.glob("*.json")])
        return Subject(str(path), fingerprint(files), None, None)
    config = found.path.parent.parent / "config.yaml"  # of the phase that trained it; a converted checkpoint has none
    phase = OmegaConf.load(config).phase.name if config.is_file() else None
    return Subject(str(path), fingerprint([found.path / "manifest.json"]), phase, found.step)


def _open(cfg: Config, subject: Subject) -> "tuple[MegatronGenerator, ModelConfig]":
    """The checkpoint on this rank, ready to answer. A CPT phase has seen no chats, whatever template its tokenizer carries."""
    from evaluation.generator import MegatronGenerator
    from megatron_tower.runtime import distributed
    from megatron_tower.training.loading import open_for_inference

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    model, tokenizer, shape = open_for_inference(Path(subject.path), cfg.parallel, cfg.precision)
    return MegatronGenerator(model, tokenizer, subject.phase != "cpt" and tokenizer.chat_template is not None, cfg.eval), shape


def _described(generator: "MegatronGenerator", example: str) -> dict[str, str]:
    text = generator.tokenizer.decode(generator.prompt(example))
    return {"example": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _flat(score: Score) -> dict[str, Any]:
    row = asdict(score)
    return row | row.pop("estimate")


def _write(folder: Path, result: dict[str, Any], lines: Sequence[Answer]) -> None:
    """scores.json goes first and comes last, so that it never speaks of other generations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").unlink(missing_ok=True)
    write_text(folder / "generations.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / "scores.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
