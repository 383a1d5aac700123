"""Metrics of answers that are there: generations.jsonl -> metrics.jsonl -> scores.json, and each line's "scores" and "spans".

Neural ones, and sacrebleu's TER where eval.metrics.ter=sacrebleu asks for it: it is slow on paragraphs, so it is not always computed.
A step of its own (`eval.stage=score`) that needs no model but the metrics': a job with one GPU or several follows the job that generated.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.held_out import Row
from evaluation.metrics import neural
from evaluation.metrics.bootstrap import Resampling, counted, estimate, ratio
from evaluation.metrics.segment import Segment
from evaluation.metrics.translation import ter, ter_statistics
from evaluation.store import Store, digest
from evaluation.tasks import TASKS
from evaluation.tasks.task import Answer, Score
from megatron_tower.config import Config, InputError

if TYPE_CHECKING:
    from evaluation.run import Plan

TER, SACREBLEU = "ter", "sacrebleu"  # the one name and place in eval.metrics that stand for no weights


def check(cfg: Config, asked: dict[str, list[Row]]) -> list[neural.Checkpoint]:
    """The metrics asked for, found and readable; raises InputError, also where no row of a task has anything for them to score."""
    for name, place in cfg.eval.metrics.items():
        if (name == TER) != (place == SACREBLEU):
            raise InputError(
                f"eval.metrics.{name}={place}: sacrebleu's TER is asked for as +eval.metrics.{TER}={SACREBLEU}, its chrF++ and BLEU "
                "are always there, and a metric with weights is called otherwise"
            )
    precision = cfg.eval.metric_precision
    found = [neural.find(name, place, cfg.eval.assets, precision=precision) for name, place in cfg.eval.metrics.items() if name != TER]
    translated = [row for task, rows in asked.items() if TASKS[task].segments for row in rows]
    if cfg.eval.metrics and not translated:
        raise InputError("eval.metrics scores translations, and none of eval.tasks translates: add wmt24pp or leave eval.metrics out")
    needy = [one.name for one in found if one.needs_reference] + ([TER] if TER in cfg.eval.metrics else [])
    if needy and not any(row.get("reference") for row in translated):
        raise InputError(f"eval.metrics.{needy[0]} compares with references, and eval.tasks have none: use a metric that needs none")
    return found


def measure(cfg: Config, plan: "Plan") -> None:
    """Add each metric of eval.metrics to the results in plan.output. Raises InputError where there are none of this plan yet."""
    from evaluation.run import flat, write

    result = plan.result()
    if result is None:
        raise InputError(
            f"{plan.output} has no answers of this model on this data: run it with eval.stage=generate first, or eval.stage=all"
        )
    path = plan.output / "generations.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    how = Resampling(cfg.eval.bootstrap_samples, cfg.eval.confidence, cfg.seed)
    with Store(plan.output / "metrics.jsonl") as store:
        for checkpoint in plan.metrics:
            rows = []
            for task, of in _by_task(lines).items():
                rows += _measured(cfg, checkpoint, task, of, store, how)
            kept = [row for row in result["scores"] if row["metric"] != checkpoint.name]
            result["scores"] = [*kept, *map(flat, rows)]
        if TER in cfg.eval.metrics:
            rows = [row for task, of in _by_task(lines).items() for row in _ter(task, of, store, how)]
            result["scores"] = [*(row for row in result["scores"] if row["metric"] != TER), *map(flat, rows)]
    result["metrics"] = {checkpoint.name: asdict(checkpoint) | {"folder": str(checkpoint.folder)} for checkpoint in plan.metrics}
    if TER in cfg.eval.metrics:
        result["metrics"][TER] = {"name": TER, "folder": SACREBLEU, "kind": TER}
    write(plan.output, result, lines)
    print(f"{plan.output / 'scores.json'} with {', '.join(result['metrics'])}")


def _by_task(lines: Sequence[Answer]) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for line in lines:
        if TASKS[line["task"]].segments:
            found.setdefault(line["task"], []).append(line)
    return found


def _measured(cfg: Config, checkpoint: neural.Checkpoint, task: str, lines: Sequence[Answer], store: Store, how: Resampling) -> list[Score]:
    """The task's scores; adds to each line what the metric says of it."""
    found = [(line, segment) for line, segment in zip(lines, TASKS[task].segments(lines, lines), strict=True) if segment]
    if checkpoint.needs_reference:
        found = [(line, segment) for line, segment in found if segment.reference]
    segments = [segment for _, segment in found]
    scored = neural.score_segments(checkpoint, segments, store, cfg.eval.metric_tokens, cfg.eval.metric_processes)
    values = [checkpoint.scale * one["score"] for one in scored]
    for (line, _), one, value in zip(found, scored, values, strict=True):
        line.setdefault("scores", {})[checkpoint.name] = round(value, 4)
        if "spans" in one:
            line.setdefault("spans", {})[checkpoint.name] = one["spans"]
    return _table(checkpoint, task, segments, values, how)


def _table(checkpoint: neural.Checkpoint, task: str, segments: Sequence[Segment], values: Sequence[float], how: Resampling) -> list[Score]:
    """Means over segments, over several pairs the mean of theirs."""
    return [
        Score(task, checkpoint.name, by, group, estimate([counted(of) for of in pairs.values()], ratio, how), checkpoint.signature)
        for (by, group), pairs in _grouped(segments, values).items()
    ]


def _ter(task: str, lines: Sequence[Answer], store: Store, how: Resampling) -> list[Score]:
    """TER of the translations that have a reference, over several pairs the mean of theirs; words as the target language has them."""
    segments, found = [], []
    for line, segment in zip(lines, TASKS[task].segments(lines, lines), strict=True):
        if segment and segment.reference:
            target, texts = line["target_locale"], (segment.hypothesis, segment.reference)
            key = digest(TER, version("sacrebleu"), target, *texts)
            if key not in store:
                counts, signature = ter_statistics(*([text] for text in texts), target)
                store.append([{"key": key, "metric": TER, "counts": counts[0].tolist(), "signature": signature}])
            segments.append(segment)
            found.append(store[key])
    scores = []
    for (by, group), pairs in _grouped(segments, found).items():
        signed = ", ".join(sorted({one["signature"] for of in pairs.values() for one in of}))
        counts = [np.array([one["counts"] for one in of]) for of in pairs.values()]
        scores.append(Score(task, TER, by, group, estimate(counts, ter, how), signed))
    return scores


def _grouped(segments: Sequence[Segment], found: Sequence[Any]) -> dict[tuple[str, str], dict[str, list[Any]]]:
    """(by, group) -> pair -> what was found of its segments; "all" first."""
    groups: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for segment, one in zip(segments, found, strict=True):
        pair = dict(segment.groups).get("pair", "all")
        for of in (("all", "all"), *segment.groups):
            groups.setdefault(of, {}).setdefault(pair, []).append(one)
    return groups
