"""Score one checkpoint on the held-out data: task -> prompts -> generations -> scores -> scores.json and generations.jsonl.

    python -m evaluation.run eval.checkpoint=runs/demo/sft
    python -m evaluation.run eval.checkpoint=runs/demo/sft parallel=tp2
    python -m evaluation.run -m eval.checkpoint=runs/demo/cpt,runs/demo/sft

The checkpoint is a run directory's phase, one checkpoint of it, or a Hugging Face folder; results go to <checkpoint>/evaluation
unless eval.output says otherwise. Does nothing when the same checkpoint was scored on the same data with the same settings.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.held_out import Row, read
from evaluation.metrics.bootstrap import Resampling
from evaluation.tasks import TASKS
from evaluation.tasks.task import Answer, Generator, Score
from megatron_tower.config import Config, InputError, entry_point
from megatron_tower.runtime import cpu
from megatron_tower.runtime.run_dir import write_text


@dataclass(frozen=True)
class Subject:
    """What is scored. sha256: of a checkpoint's manifest, or of a Hugging Face folder's weights and JSON files.
    phase, step: of a checkpoint that was trained here."""

    path: str
    sha256: str
    phase: str | None
    step: int | None


@entry_point
def main(cfg: Config) -> None:
    from megatron_tower.runtime.local import relaunch_if_needed

    if not cfg.eval.checkpoint:
        raise InputError("eval.checkpoint is not set: name a run directory, one of its checkpoints or a Hugging Face folder")
    if not relaunch_if_needed(cfg, "evaluation.run"):
        evaluate(cfg)


def evaluate(cfg: Config) -> None:
    """Score cfg.eval.checkpoint on this rank's part of the layout; rank 0 writes. Raises InputError before anything is loaded."""
    cpu.install()
    from megatron_tower.data import manifest
    from megatron_tower.runtime import distributed

    data, path = Path(cfg.data.folder), Path(cfg.eval.checkpoint)
    output = Path(cfg.eval.output) if cfg.eval.output else path / "evaluation"
    manifest.verify(data)
    asked = {task.name: task.choose(read(data / "held_out" / f"{task.name}.jsonl", task.fields), cfg.eval) for task in TASKS}
    subject = identify(path)
    settings = {key: value for key, value in asdict(cfg.eval).items() if key not in ("checkpoint", "output")}
    data_sha256 = _sha256([data / "manifest.json"])
    key = hashlib.sha256(json.dumps([subject.sha256, data_sha256, settings, cfg.seed], sort_keys=True).encode()).hexdigest()
    if _is_done(output / "scores.json", key):
        if distributed.is_rank_zero():
            print(f"{output / 'scores.json'} already holds this checkpoint's scores on this data")
        return
    began = time.monotonic()
    generator = _open(cfg, subject)
    seconds = {"open": time.monotonic() - began}
    scores, prompts, lines = score_tasks(generator, asked, Resampling(cfg.eval.bootstrap_samples, cfg.eval.confidence, cfg.seed), seconds)
    result = {
        "key": key,
        "checkpoint": asdict(subject),
        "data": {"folder": cfg.data.folder, "manifest_sha256": data_sha256},
        "eval": settings,
        "decoding": {"method": "greedy", "max_new_tokens": cfg.eval.max_new_tokens, "prompts": "chat" if generator.chat else "plain text"},
        "layout": asdict(cfg.parallel),
        "prompts": {name: _described(generator, text) for name, text in prompts.items()},
        "items": {name: len(rows) for name, rows in asked.items()},
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "scores": [_flat(score) for score in scores],
    }
    if distributed.is_rank_zero():
        _write(output, result, lines)
        print(f"{output / 'scores.json'} ({sum(seconds.values()):.0f} s)")
    distributed.shutdown()


def score_tasks(
    generator: Generator, asked: dict[str, list[Row]], how: Resampling, seconds: dict[str, float]
) -> tuple[list[Score], dict[str, str], list[Answer]]:
    """(scores, an example prompt a task with its text as `{field}`, lines of generations.jsonl); adds each task's seconds."""
    scores: list[Score] = []
    prompts: dict[str, str] = {}
    lines: list[Answer] = []
    for task in TASKS:
        began, rows = time.monotonic(), asked[task.name]
        answers = task.ask(generator, rows)
        scores += task.score(rows, answers, how)
        if example := task.prompt(rows[0] | {task.text: f"{{{task.text}}}"}, generator.chat):
            prompts[task.name] = example
        lines += [{"task": task.name, **row, **answer} for row, answer in zip(rows, answers, strict=True)]
        seconds[task.name] = time.monotonic() - began
    return scores, prompts, lines


def identify(path: Path) -> Subject:
    """What lies at `path`; raises InputError when it is no checkpoint."""
    if (path / "config.json").is_file():
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.json")])
        return Subject(str(path), _sha256(files), None, None)
    from megatron_tower.training import checkpoint

    found = checkpoint.find(path)
    if found is None:
        raise InputError(f"eval.checkpoint={path} holds neither a checkpoint nor a Hugging Face config.json: name a folder that does")
    config = found.path.parent.parent / "config.yaml"
    return Subject(str(path), _sha256([found.path / "manifest.json"]), OmegaConf.load(config).phase.name, found.step)


def _open(cfg: Config, subject: Subject) -> Any:
    """The checkpoint on this rank, ready to answer. A CPT phase has seen no chats, whatever template its tokenizer carries."""
    from evaluation.generator import MegatronGenerator
    from megatron_tower.runtime import distributed
    from megatron_tower.training.checkpoint import open_for_inference

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    model, tokenizer, _ = open_for_inference(Path(subject.path), cfg.parallel, cfg.precision)
    return MegatronGenerator(model, tokenizer, subject.phase != "cpt" and tokenizer.chat_template is not None, cfg.eval)


def _described(generator: Any, example: str) -> dict[str, str]:
    text = generator.tokenizer.decode(generator.prompt(example))
    return {"example": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _is_done(path: Path, key: str) -> bool:
    """Whether `path` holds the scores of this checkpoint, data and settings."""
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("key") == key
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): remove it") from error


def _flat(score: Score) -> dict[str, Any]:
    row = asdict(score)
    return row | row.pop("estimate")


def _write(folder: Path, result: dict[str, Any], lines: Sequence[Answer]) -> None:
    """scores.json goes first and comes last, so that it never speaks of other generations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").unlink(missing_ok=True)
    write_text(folder / "generations.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / "scores.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _sha256(files: Sequence[Path]) -> str:
    """Of the files' names and bytes, streamed."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
