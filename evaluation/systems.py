"""What the report of several systems shows: evaluations read from their folders and compared cell by cell.

Reads scores.json and generations.jsonl of each system, the latter line by line: of a segment only its scores and what tells it from
others are held.
A line is the same item in two files when task and "id" agree, or, without an "id", task, pair and the text asked for.
Leaves out: neural metrics (a line's "scores" and "spans" come with it), items that only some of the systems answered (in comparisons).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.metrics.bootstrap import Estimate, Resampling, counted, difference, ratio
from evaluation.store import digest
from evaluation.story import TITLES
from megatron_tower.config import InputError

LOWER = {"ter", "bits_per_byte", "perplexity", "empty", "copied", "truncated", "wrong_language", "error", "no_verdict", "losses"}
LOWER |= {"wrong", "timeout", "memory", "unparsable", "failed", "judge_unparsable", "judge_failed"}
NEUTRAL = {"copy_chrf", "characters", "length", "words", "tokens", "ties", "unchanged", "chose_a"}  # neither end is better
LANGUAGES = ("pair", "language", "locale")  # what groups are of one language
TEXT_FIELDS = ("source", "prompt", "question", "problem", "instruction")

Cell = tuple[str, str, str, str]  # task, metric, by, group
Line = dict[str, Any]


@dataclass(frozen=True)
class System:
    """An evaluation. segments: (task, metric) -> item -> (its groups, score); strata of a comparison are pairs."""

    label: str
    folder: Path
    scores: dict[Cell, Estimate]
    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    signatures: dict[tuple[str, str], str]
    segments: dict[tuple[str, str], dict[str, tuple[dict[str, str], float]]] = field(repr=False)

    @property
    def run(self) -> str | None:
        """Of the training that this is a stage of, its base included; None for a model from elsewhere."""
        path = Path(self.checkpoint.get("path", ""))
        return str(path.parent) if self.checkpoint.get("phase") or path.name == "base" else None


def read(named: Sequence[str]) -> list[System]:
    """named: FOLDER or FOLDER=Label, an evaluation's or a run's, whose stages are called "Label stage". Raises InputError for a folder
    without scores, malformed files and a label used twice."""
    systems = []
    for name in named:
        folder, label = Path(name), ""
        if not folder.is_dir() and "=" in name:
            before, label = name.rsplit("=", 1)
            folder = Path(before)
        if (folder / "scores.json").is_file():
            systems.append(_system(folder, label))
        else:
            systems += [_system(stage / "evaluation", f"{label} {stage.name}".strip()) for stage in stages(folder)]
    labels = [system.label for system in systems]
    if double := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"two systems are called {double[0]}: name them apart, FOLDER=Label")
    return systems


def stages(run: Path) -> list[Path]:
    """The evaluated stages of a run: those of the recipe in its order, then any others by name."""
    names = list(TITLES)
    found = sorted(path.parents[1] for path in run.glob("*/evaluation/scores.json"))
    if not found:
        raise InputError(f"{run} holds neither scores.json nor <stage>/evaluation/scores.json: give a folder of evaluation.run, or a run's")
    return sorted(found, key=lambda stage: names.index(stage.name) if stage.name in names else len(names))


def _system(folder: Path, label: str) -> System:
    path = folder / "scores.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            ((row["task"], row["metric"], row["by"], row["group"]), Estimate(row["value"], row["low"], row["high"], row["count"]))
            for row in found["scores"]
        ]
        signatures = {
            (row["task"], row["metric"]): row["signature"] for row in found["scores"] if row.get("signature") and row["by"] == "all"
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the scores of an evaluation ({error!r}): run evaluation.run again") from error
    checkpoint = found.get("checkpoint", {})
    label = label or found.get("model", {}).get("label") or checkpoint.get("phase") or folder.resolve().parent.name
    segments: dict[tuple[str, str], dict[str, tuple[dict[str, str], float]]] = {}
    by, groups = {cell[2] for cell, _ in rows}, {}
    for line in lines(folder):
        for metric, value in line.get("scores", {}).items():
            if isinstance(value, int | float):
                found_in = _groups(line, by)
                shared = groups.setdefault(tuple(found_in.items()), found_in)  # one dict for all segments of the same groups
                segments.setdefault((line["task"], metric), {})[item(line)] = (shared, float(value))
    return System(label, folder, dict(rows), checkpoint, found.get("settings", {}), signatures, segments)


def lines(folder: Path) -> Iterator[Line]:
    """Of generations.jsonl, where there is one."""
    path = folder / "generations.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                line["task"] = str(line["task"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f'{path}:{number}: not an object with a "task": run evaluation.run again') from error
            yield line


def pair(line: Line) -> str:
    """ "en->de_DE" of a translation, the language of anything else that tells it, else ""."""
    if "source_locale" in line and "target_locale" in line:
        return f"{line['source_locale']}->{line['target_locale']}"
    if named := line.get("pair") or line.get("lp"):
        return str(named) if "->" in str(named) else str(named).replace("-", "->", 1)  # WMT writes en-de_DE
    return str(line.get("language") or line.get("locale") or "")


def asked(line: Line) -> str:
    return next((str(line[name]) for name in TEXT_FIELDS if line.get(name)), "")


def item(line: Line) -> str:
    """Tells an item from any other of all tasks, and is the same in every system's file."""
    return digest(line["task"], str(line["id"]) if "id" in line else [pair(line), asked(line)])[:16]


def _groups(line: Line, by: set[str]) -> dict[str, str]:
    plain = {name: value for name, value in line.items() if name in by and isinstance(value, str)}
    return plain | {"all": "all", "pair": pair(line)}


def better(metric: str) -> int:
    """1: higher is better; -1: lower is; 0: neither."""
    return 0 if metric in NEUTRAL or metric.startswith("input_") else -1 if metric in LOWER or metric.startswith("metricx") else 1


@dataclass(frozen=True)
class Compared:
    """best: its system's place; tied: places of those that aren't worse beyond chance; paired: by the paired bootstrap."""

    best: int | None
    tied: tuple[int, ...] = ()
    paired: bool = False


def compare(systems: Sequence[System], cell: Cell, how: Resampling) -> Compared:
    """The best system of a cell, and those tied with it: the interval of the difference holds 0 (paired bootstrap over common
    segments, Koehn 2004) or, where either has no segment scores, the two intervals overlap."""
    task, metric, by, group = cell
    way, found = better(metric), {i: system.scores[cell] for i, system in enumerate(systems) if cell in system.scores}
    if not way or len(found) < 2:
        return Compared(None)
    best = max(found, key=lambda i: way * found[i].value)
    tied, paired = [], []
    for i in found.keys() - {best}:
        change = _change(systems[i], systems[best], (task, metric), (by, group), how)
        paired.append(change is not None)
        low, high = (change.low, change.high) if change else _apart(found[i], found[best])
        if low <= 0 <= high:
            tied.append(i)
    return Compared(best, tuple(sorted(tied)), all(paired))


def _apart(one: Estimate, other: Estimate) -> tuple[float, float]:
    """The differences that two intervals leave possible."""
    return other.low - one.high, other.high - one.low


def _change(before: System, after: System, of: tuple[str, str], inside: tuple[str, str], how: Resampling) -> Estimate | None:
    """How much higher `after` scores on the common segments of a group, mean over pairs."""
    mine, theirs = before.segments.get(of, {}), after.segments.get(of, {})
    by, group = inside
    strata: dict[str, list[str]] = {}
    for key, (groups, _) in mine.items():
        if key in theirs and groups.get(by) == group:
            strata.setdefault(groups["pair"], []).append(key)
    if not strata:
        return None
    both = [[counted([side[key][1] for key in keys]) for keys in strata.values()] for side in (mine, theirs)]
    return difference(*both, ratio, how)
