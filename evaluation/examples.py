"""Which segments a report of several systems shows: the worst, the failures, and those on which one system beats another.

Reads generations.jsonl line by line, twice: in between, what tells segments apart and one score of each are held. Of each system and
pair: its worst segments and as many of each failure. Of each two systems, both ways: those with the widest gaps, language pairs in turn.
One of these, one of those, until the page is full. Leaves out: all others; the page says how many there are.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations, repeat, zip_longest
from math import inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.translation import chrf, chrf_statistics, is_copied, is_wrong_language
from evaluation.systems import Line, System, asked, better, item, lines, pair
from megatron_tower.config import InputError

RANKING = ("xcomet", "comet22", "metricx", "cometkiwi", "chrf")  # which segment is worse: the first that is known, by its beginning
FAILURES = ("empty", "copied", "truncated", "wrong_language")
PER_PAIR = 20  # worst segments, and as many of each failure, of one system and pair
PER_GAP = 100  # segments on which one system beats another
CLIP = 1500  # characters of a text
BUDGET = 8_000_000  # characters of all examples
MOST = 20_000  # examples looked at to fill it


def examples(systems: Sequence[System]) -> tuple[list[dict[str, Any]], int]:
    """(examples with every system's answer, worst first; the number of translated items)."""
    number: dict[str, int] = {}  # of an item, by its key
    pairs: list[str] = []
    metrics: list[str] = []  # by which an item is judged
    scored = [array("d") for _ in systems]  # how bad each item is, NaN where that isn't known by the same metric
    queues: dict[tuple[int, str, str], list[tuple[float, int]]] = {}
    for place, system in enumerate(systems):
        for line in _translations(system):
            metric, bad = badness(line)
            i = number.setdefault(item(line), len(number))
            if i == len(pairs):
                pairs.append(pair(line))
                metrics.append(metric)
            scored[place].extend(repeat(nan, i + 1 - len(scored[place])))
            scored[place][i] = bad if metric == metrics[i] else nan
            for kind in ["worst", *failures(line)]:
                queue = queues.setdefault((place, pair(line), kind), [])
                queue.append((bad, i))
                if len(queue) > 20 * PER_PAIR:
                    queue[:] = _worst(queue)
    known = np.array([[*column, *repeat(nan, len(number) - len(column))] for column in scored])
    worst = _in_turn([[i for _, i in _worst(queue)] for _, queue in sorted(queues.items())])
    wanted = list(dict.fromkeys(_in_turn([list(worst), list(_in_turn(gaps(known, np.array(pairs))))])))[:MOST]
    keys = list(number)
    return _filled(systems, [keys[i] for i in wanted]), len(number)


def _translations(system: System) -> Iterator[Line]:
    return (line for line in lines(system.folder) if "output" in line and line.get("source") and pair(line))


def _worst(queue: list[tuple[float, int]]) -> list[tuple[float, int]]:
    return sorted(queue, key=lambda one: (-one[0], one[1]))[:PER_PAIR]


def _in_turn(queues: Sequence[Sequence[int]]) -> Iterator[int]:
    """The first of each, then the second of each, and so on."""
    return (i for turn in zip_longest(*queues) for i in turn if i is not None)


def gaps(bad: NDArray, pairs: NDArray) -> list[list[int]]:
    """Of each two systems, both ways: items on which the first is better, language pairs in turn, of each turn the widest gap first.

    bad: [systems, items], NaN where unknown; pairs: [items]."""
    members = [np.flatnonzero(pairs == name) for name in np.unique(pairs)]
    queues = []
    for one, other in permutations(bad, 2):
        gap = np.nan_to_num(other - one, nan=0.0, posinf=0.0, neginf=0.0)
        widest = [of[np.argsort(-gap[of], kind="stable")[:PER_GAP]] for of in members]
        turns = (sorted((i for i in turn if i is not None), key=lambda i: -gap[i]) for turn in zip_longest(*widest))
        queues.append([int(i) for turn in turns for i in turn if gap[i] > 0][:PER_GAP])
    return queues


def _filled(systems: Sequence[System], wanted: Iterable[str]) -> list[dict[str, Any]]:
    """As many of the wanted as there is room for."""
    found: dict[str, dict[str, Any]] = {key: {} for key in wanted}
    for place, system in enumerate(systems):
        for line in _translations(system):
            if (key := item(line)) in found:
                _add(found[key], place, line, len(systems))
    kept, room = [], BUDGET
    for example in found.values():
        room -= len(embedded(example))
        if room < 0:
            break
        kept.append(example)
    return sorted(kept, key=lambda one: -one["bad"])


def _add(example: dict[str, Any], place: int, line: Line, systems: int) -> None:
    metric, bad = badness(line)
    example.setdefault("task", line["task"])
    example.setdefault("pair", pair(line))
    example.setdefault("source", clip(asked(line)))
    example.setdefault("reference", clip(str(line.get("reference") or line.get("target") or "")))
    example["bad"] = max(example.get("bad", -1e9), bad)
    marked = next(iter(line.get("spans", {}).values()), [])  # of the first metric that marks errors; offsets are into the bare text
    spans = [[s["start"], s["end"], str(s.get("severity", ""))] for s in marked]
    answer = {"text": clip(line["output"].strip()), "failures": failures(line), "scores": line.get("scores", {}), "spans": spans}
    example.setdefault("answers", [None] * systems)[place] = answer | ({"metric": metric, "bad": round(bad, 4)} if metric else {})


def clip(text: str) -> str:
    return text if len(text) <= CLIP else text[:CLIP] + "…"


def embedded(value: Any) -> str:
    """JSON that no text can end a script element from."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def failures(line: Line) -> list[str]:
    """Which of FAILURES an answer to a translation is."""
    output, reference = str(line.get("output", "")).strip(), str(line.get("reference") or line.get("target") or "")
    found = []
    if not output:
        found.append("empty")
    elif reference and is_copied(output, asked(line), reference):
        found.append("copied")
    if line.get("finish") == "length":
        found.append("truncated")
    if output and reference and (target := pair(line).rpartition("->")[2].rpartition("-")[2]) and is_wrong(output, reference, target):
        found.append("wrong_language")
    return found


def is_wrong(output: str, reference: str, target: str) -> bool:
    try:
        return bool(is_wrong_language(output, reference, target))
    except InputError:  # a locale that has no name here
        return False


def badness(line: Line) -> tuple[str, float]:
    """(metric, how bad a translation is by it); sentence-level chrF++ where no neural metric has scored it, ("", -inf) without a
    reference."""
    known = line.get("scores", {})
    for metric in (name for first in RANKING for name in known if name.startswith(first)):
        if isinstance(known[metric], int | float):
            return metric, -better(metric) * known[metric]
    reference = line.get("reference") or line.get("target")
    if not reference:
        return "", -inf
    counts, _ = chrf_statistics([str(line["output"]).strip()], [str(reference)])
    return "chrF++", -float(chrf(counts)[0])
