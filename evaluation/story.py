"""What a run left on disk, read for its report: scores, generations, training curves and data manifest, nothing computed.

A stage is `run_dir/<name>` with evaluation/scores.json in it. Bad or mismatched files -> InputError.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.metrics.bootstrap import Estimate
from megatron_tower.config import InputError

RECORDED = {"model", "data", "settings", "decoding", "prompts", "items", "seconds", "scores"}
TITLES = {"base": "Base", "cpt": "CPT", "sft": "SFT", "wpo": "WPO", "grpo": "GRPO"}


@dataclass(frozen=True)
class Stage:
    """One checkpoint of the run: what it scored, what it answered, how it was trained (no curve for the base)."""

    name: str
    scores: dict[str, Any]
    generations: list[dict[str, Any]]
    curve: list[dict[str, float]]
    config: str

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    @cached_property
    def tokens(self) -> list[float]:
        """Trained on in each step of the curve, as recorded; a run of an earlier version recorded none, its rows were all full."""
        if all("tokens" in row for row in self.curve):
            return [row["tokens"] for row in self.curve]
        phase = OmegaConf.create(self.config).phase
        return [phase.global_batch_size * phase.seq_length] * len(self.curve)

    def curve_mean(self, key: str) -> float | None:
        """Mean over the logged steps that have the key."""
        values = [row[key] for row in self.curve if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    def lines(self, task: str) -> list[dict[str, Any]]:
        """The task's items with what this stage answered, in the same order for every stage."""
        return [line for line in self.generations if line["task"] == task]

    @cached_property
    def table(self) -> dict[tuple[str, str, str, str], Estimate]:
        keys = ("task", "metric", "by", "group")
        return {tuple(s[k] for k in keys): Estimate(s["value"], s["low"], s["high"], s["count"]) for s in self.scores["scores"]}

    def get(self, task: str, metric: str, by: str = "all", group: str = "all") -> Estimate | None:
        return self.table.get((task, metric, by, group))


@dataclass(frozen=True)
class Story:
    """A run: its stages in order, and the data they were trained and scored on."""

    run_dir: Path
    stages: list[Stage]
    data_folder: Path
    manifest: dict[str, Any]

    def groups(self, task: str, metric: str, by: str) -> list[str]:
        """Every group that some stage has this metric for, sorted."""
        keys = {key for stage in self.stages for key in stage.table}
        return sorted({group for t, m, b, group in keys if (t, m, b) == (task, metric, by)})


def read(run_dir: Path, names: list[str]) -> Story:
    """The stages among `names` that were evaluated, in that order."""
    present = [name for name in names if (run_dir / name / "evaluation" / "scores.json").is_file()]
    if not present:
        raise InputError(
            f"{run_dir} holds no <stage>/evaluation/scores.json (stages: {', '.join(names)}): "
            f"run python -m evaluation.run eval.checkpoint={run_dir}/<stage> first"
        )
    stages = [_stage(run_dir / name) for name in present]
    for part, of in (("data", lambda s: s.scores["data"]["manifest_sha256"]), ("settings", lambda s: s.scores["settings"])):
        for stage in stages[1:]:
            if of(stage) != of(stages[0]):
                raise InputError(
                    f"{run_dir}: {stages[0].name} and {stage.name} were evaluated with different {part} and don't compare: "
                    "run evaluation.run on both again"
                )
    folder = Path(stages[0].scores["data"]["folder"])
    return Story(run_dir, stages, folder, _json(folder / "manifest.json"))


def _stage(folder: Path) -> Stage:
    evaluation = folder / "evaluation"
    scores = _json(evaluation / "scores.json")
    if missing := RECORDED - scores.keys():
        raise InputError(f"{evaluation / 'scores.json'} lacks {', '.join(sorted(missing))}: remove it and run evaluation.run again")
    generations = list(_lines(evaluation / "generations.jsonl"))
    if (answered := Counter(line["task"] for line in generations)) != scores["items"]:
        raise InputError(
            f"{evaluation / 'generations.jsonl'} holds {dict(answered)} answers and scores.json speaks of {scores['items']}: "
            "remove scores.json and run evaluation.run again"
        )
    curve, config = folder / "metrics.jsonl", folder / "config.yaml"
    return Stage(
        folder.name,
        scores,
        generations,
        [row for row in _lines(curve) if "loss" in row] if curve.is_file() else [],
        config.read_text() if config.is_file() else "",
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing: was it moved? evaluation.run and tools.prepare_data write it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): remove it and run the step that writes it again") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path} is missing: remove {path.parent}/scores.json and run evaluation.run again")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error}): remove the file and run the step that writes it again") from error
