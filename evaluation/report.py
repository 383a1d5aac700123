"""Any number of evaluated systems side by side: index.html (self-contained), tables.md, tables.tex, tables.csv, pareto.svg and .png.

    python -m evaluation.report runs/mine other/evaluation=Other --output report --baseline Other

A run's directory stands for its evaluated stages in order (what they mean is said by evaluation/run_report.py). Examples are the worst
segments of each system and pair and each kind of failure, taken in turn until the page is full; the page says how many were left out.
Leaves out: computing scores.
"""

import argparse
import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from evaluation.figures import COLOURS, MARKERS, STYLE, WIDTH, save
from evaluation.metrics.bootstrap import Resampling
from evaluation.systems import (
    FAILURES,
    LANGUAGES,
    Cell,
    Compared,
    System,
    asked,
    badness,
    better,
    compare,
    failures,
    item,
    lines,
    pair,
    read,
)
from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.runtime.run_dir import write_text

PER_PAIR = 20  # worst segments, and as many of each failure, of one system and pair
CLIP = 1500  # characters of a text
BUDGET = 8_000_000  # characters of all examples
X = ("wmt24pp/xcomet_xxl", "wmt24pp/xcomet", "wmt24pp/comet22", "wmt24pp/chrf", "translation/chrf")
Y = ("m_arenahard/win_rate", "ifeval/prompt_strict", "general/accuracy", "verifiable/reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="an evaluation's folder or a run's directory, FOLDER or FOLDER=Label")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--baseline", help="label that the heat maps compare with; the first system if not given")
    parser.add_argument("--x", help="task/metric of the figure's horizontal axis")
    parser.add_argument("--y", help="task/metric of its vertical axis")
    options = parser.parse_args()
    try:
        print(f"report: {write(read(options.runs), options.output, options.baseline, (options.x, options.y))}")
    except InputError as error:
        refuse(error)


def write(systems: Sequence[System], output: Path, baseline: str | None = None, axes: tuple[str | None, str | None] = (None, None)) -> Path:
    """Returns the page's path. Raises InputError, before anything is written, for a baseline or an axis that no system has."""
    labels = [system.label for system in systems]
    if baseline is not None and baseline not in labels:
        raise InputError(f"--baseline {baseline} is none of the systems: use one of {', '.join(labels)}")
    chosen = [axis(systems, *both) for both in zip(axes, (X, Y), "xy", strict=True)]
    how = Resampling()
    cells = sorted({cell for system in systems for cell in system.scores if cell[2] in ("all", *LANGUAGES)}, key=order)
    table = [(cell, compare(systems, cell, how)) for cell in cells]
    shown, known = examples(systems)
    output.mkdir(parents=True, exist_ok=True)
    figure = pareto(systems, *chosen) if all(chosen) else None
    drawn = save(figure, output / "pareto.png") if figure else None
    if drawn:
        write_text(output / "pareto.svg", base64.b64decode(drawn.partition(",")[2]).decode())
    facts = {
        "systems": systems,
        "labels": labels,
        "overall": [row for row in table if row[0][2] == "all"],
        "by_language": [row for row in table if row[0][2] != "all" and better(row[0][1])],
        "paired": any(found.paired for _, found in table),
        "overlap": any(found.best is not None and not found.paired for _, found in table),
        "heat": heat(systems, labels.index(baseline) if baseline else 0, cells) if len(systems) > 1 else [],
        "baseline": baseline or labels[0],
        "pareto": drawn,
        "axes": chosen,
        "examples": embedded({"labels": labels, "failures": FAILURES, "examples": shown}),
        "shown": len(shown),
        "known": known,
        "better": better,
        "number": number,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    write_text(output / "tables.csv", as_csv(systems))
    write_text(output / "tables.md", as_markdown(labels, systems, table))
    write_text(output / "tables.tex", as_latex(labels, systems, table))
    write_text(output / "index.html", environment.get_template("report.html.j2").render(facts))
    return output / "index.html"


def order(cell: Cell) -> tuple:
    task, metric, by, group = cell
    return by != "all", task, metric, by, group


def axis(systems: Sequence[System], wanted: str | None, usual: Sequence[str], name: str) -> str | None:
    """The asked task/metric, else the first usual one that a system has."""
    known = {f"{task}/{metric}" for system in systems for task, metric, by, _ in system.scores if by == "all"}
    if wanted is not None and wanted not in known:
        raise InputError(f"--{name} {wanted} was scored for no system: use one of {', '.join(sorted(known))}")
    return wanted or next((candidate for candidate in usual if candidate in known), None)


@plt.rc_context(STYLE)
def pareto(systems: Sequence[System], x: str, y: str) -> Figure | None:
    """One point a system with both intervals; stages of one run are joined in the order given."""
    points = []
    for i, system in enumerate(systems):
        found = [system.scores.get((*name.split("/", 1), "all", "all")) for name in (x, y)]
        if all(found):
            points.append((i, system, *found))
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for run in dict.fromkeys(system.run for _, system, _, _ in points if system.run):
        of = [(across.value, up.value) for _, system, across, up in points if system.run == run]
        axes.plot(*zip(*of, strict=True), color="#aab2bc", linewidth=1.2, zorder=1)
    for i, system, across, up in points:
        spread = {"xerr": [[across.value - across.low], [across.high - across.value]], "yerr": [[up.value - up.low], [up.high - up.value]]}
        look = {"fmt": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "capsize": 3, "linewidth": 1.3, "markersize": 7}
        axes.errorbar(across.value, up.value, **spread, **look, label=system.label.replace("$", r"\$"))
    axes.set_xlabel(f"{x.replace('/', ': ')} →")
    axes.set_ylabel(f"{y.replace('/', ': ')} →")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def heat(systems: Sequence[System], baseline: int, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A map of each task, metric and kind of language: differences to the baseline, and how strongly each is coloured (-1 to 1)."""
    maps = []
    wanted = [cell for cell in cells if cell[2] in LANGUAGES and better(cell[1]) and cell in systems[baseline].scores]
    for head in dict.fromkeys(cell[:3] for cell in wanted):
        rows = []
        for cell in (cell for cell in wanted if cell[:3] == head):
            start = systems[baseline].scores[cell].value
            rows.append((cell[3], [system.scores[cell].value - start if cell in system.scores else None for system in systems]))
        largest = max((abs(value) for _, values in rows for value in values if value is not None), default=0) or 1
        maps.append({"head": head, "rows": rows, "largest": largest})
    return maps


def examples(systems: Sequence[System]) -> tuple[list[dict[str, Any]], int]:
    """(examples with every system's answer, number of translated items); worst first, failures too, until BUDGET is full."""
    queues: dict[tuple[int, str, str], list[tuple[float, str]]] = {}
    known = set()
    for place, system in enumerate(systems):
        for line in lines(system.folder):
            if "output" not in line or not line.get("source") or not pair(line):
                continue
            key, bad = item(line), badness(line)
            known.add(key)
            for kind in ["worst", *failures(line)]:
                queue = queues.setdefault((place, pair(line), kind), [])
                queue.append((bad if bad is not None else float("-inf"), key))
                if len(queue) > 20 * PER_PAIR:
                    queue[:] = sorted(queue, reverse=True)[:PER_PAIR]
    ranked = [sorted(queue, reverse=True)[:PER_PAIR] for _, queue in sorted(queues.items())]
    wanted = list(dict.fromkeys(queue[rank][1] for rank in range(PER_PAIR) for queue in ranked if rank < len(queue)))
    found: dict[str, dict[str, Any]] = {key: {} for key in wanted}
    for place, system in enumerate(systems):
        for line in lines(system.folder):
            if "output" in line and (key := item(line)) in found:
                _add(found[key], place, line, len(systems))
    kept, room = [], BUDGET
    for key in wanted:
        room -= len(embedded(found[key]))
        if room < 0:
            break
        kept.append(found[key])
    return sorted(kept, key=lambda one: -one["bad"]), len(known)


def _add(example: dict[str, Any], place: int, line: dict[str, Any], systems: int) -> None:
    bad = badness(line)
    example.setdefault("task", line["task"])
    example.setdefault("pair", pair(line))
    example.setdefault("source", clip(asked(line)))
    example.setdefault("reference", clip(str(line.get("reference") or line.get("target") or "")))
    example["bad"] = max(example.get("bad", -1e9), bad if bad is not None else -1e9)
    marked = next(iter(line.get("spans", {}).values()), [])  # of the first metric that marks errors; offsets are into the bare text
    spans = [[s["start"], s["end"], str(s.get("severity", ""))] for s in marked]
    answers = example.setdefault("answers", [None] * systems)
    answers[place] = {"text": clip(line["output"].strip()), "failures": failures(line), "scores": line.get("scores", {}), "spans": spans}


def clip(text: str) -> str:
    return text if len(text) <= CLIP else text[:CLIP] + "…"


def embedded(value: Any) -> str:
    """JSON that no text can end a script element from."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def as_csv(systems: Sequence[System]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["system", "task", "metric", "by", "group", "value", "low", "high", "count", "signature"])
    for system in systems:
        for cell, found in system.scores.items():
            writer.writerow([system.label, *cell, found.value, found.low, found.high, found.count, system.signatures.get(cell[:2], "")])
    return text.getvalue()


def marked(systems: Sequence[System], cell: Cell, found: Compared, bold: str, tie: str) -> list[str]:
    cells = [number(system.scores[cell].value) if cell in system.scores else "–" for system in systems]
    return [bold.format(c) if i == found.best else c + tie if i in found.tied else c for i, c in enumerate(cells)]


def as_markdown(labels: Sequence[str], systems: Sequence[System], table: Sequence[tuple[Cell, Compared]]) -> str:
    heads = ["task", "metric", "group", *(" ".join(label.split()).replace("|", "\\|") for label in labels)]
    rows = [heads, ["---"] * 3 + ["---:"] * len(labels)]
    rows += [[cell[0], cell[1], cell[3], *marked(systems, cell, found, "**{}**", "=")] for cell, found in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\nBold: best; =: tied with it.\n"


def as_latex(labels: Sequence[str], systems: Sequence[System], table: Sequence[tuple[Cell, Compared]]) -> str:
    rows = [[*map(latex, (*cell[:2], cell[3])), *marked(systems, cell, found, r"\textbf{{{}}}", r"$^{=}$")] for cell, found in table]
    body = "".join(f"{' & '.join(row)} \\\\\n".replace("–", "--") for row in rows)
    heads = " & ".join(map(latex, ("task", "metric", "group", *labels)))
    return f"\\begin{{tabular}}{{lll{'r' * len(labels)}}}\n\\hline\n{heads} \\\\\n\\hline\n{body}\\hline\n\\end{{tabular}}\n"


def latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", ">": r"\textgreater{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


if __name__ == "__main__":
    main()
