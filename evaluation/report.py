"""Any number of evaluated systems side by side: index.html (self-contained), tables.md, tables.tex, tables.csv, pareto.svg and .png.

    python -m evaluation.report runs/mine other/evaluation=Other --output report --baseline Other

A run's directory stands for its evaluated stages in order (what they mean is said by evaluation/run_report.py). Examples are chosen by
evaluation/examples.py. Leaves out: computing scores.
"""

import argparse
import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from evaluation.examples import FAILURES, embedded, examples
from evaluation.figures import COLOURS, MARKERS, STYLE, WIDTH, name_points, save
from evaluation.metrics.bootstrap import Resampling
from evaluation.systems import LANGUAGES, Cell, Compared, System, better, compare, read
from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.runtime.run_dir import check_writable, write_text

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
    check_writable(output, f"--output {output}")
    chosen = [axis(systems, *both) for both in zip(axes, (X, Y), "xy", strict=True)]
    how = Resampling()
    cells = sorted({cell for system in systems for cell in system.scores if cell[2] in ("all", *LANGUAGES)}, key=order)
    table = [(cell, compare(systems, cell, how)) for cell in cells]
    shown, known = examples(systems)
    differ = unlike(systems)
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
        "unlike": differ,
        "heat": heat(systems, labels.index(baseline) if baseline else 0, cells, chosen[0]) if len(systems) > 1 else [],
        "baseline": baseline or labels[0],
        "pareto": drawn,
        "axes": chosen,
        "examples": embedded({"labels": labels, "failures": FAILURES, "examples": shown}),
        "shown": len(shown),
        "known": known,
        "better": better,
        "digits": lambda cell: digits(systems, cell),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    write_text(output / "tables.csv", as_csv(systems))
    write_text(output / "tables.md", as_markdown(labels, systems, table, differ))
    write_text(output / "tables.tex", as_latex(labels, systems, table))
    write_text(output / "index.html", environment.get_template("report.html.j2").render(facts))
    return output / "index.html"


def unlike(systems: Sequence[System]) -> list[str]:
    """Each task/metric that was not scored by the same weights, program and precision for all systems that have it."""
    found: dict[str, set[str]] = {}
    for system in systems:
        for names, signature in system.signatures.items():
            found.setdefault("/".join(names), set()).add(signature)
    return sorted(name for name, signatures in found.items() if len(signatures) > 1)


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
    """One point a system with both intervals and its name, better up and right; stages of one run are joined in the order given, systems
    that none beats on both axes by a dashed line."""
    ways = [better(name.split("/", 1)[1]) or 1 for name in (x, y)]
    points = []
    for i, system in enumerate(systems):
        found = [system.scores.get((*name.split("/", 1), "all", "all")) for name in (x, y)]
        if all(found):
            points.append((i, system, *found))
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    for run in dict.fromkeys(system.run for _, system, _, _ in points if system.run):
        of = [(across.value, up.value) for _, system, across, up in points if system.run == run]
        axes.plot(*zip(*of, strict=True), color="#aab2bc", linewidth=1.2, zorder=1)
    best = front([(across.value, up.value) for _, _, across, up in points], ways)
    axes.plot(*zip(*best, strict=True), color="#22272e", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for i, _, across, up in points:
        spread = {"xerr": [[across.value - across.low], [across.high - across.value]], "yerr": [[up.value - up.low], [up.high - up.value]]}
        look = {"fmt": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
        axes.errorbar(across.value, up.value, **spread, **look, capsize=2, linewidth=1, markersize=6)
    axes.margins(0.15)
    axes.set_xlabel(f"{x.replace('/', ': ')} →")
    axes.set_ylabel(f"{y.replace('/', ': ')} →")
    axes.xaxis.set_inverted(ways[0] < 0)
    axes.yaxis.set_inverted(ways[1] < 0)
    name_points(axes, [(across, up, system.label) for _, system, across, up in points])
    return figure


def front(points: Sequence[tuple[float, float]], ways: Sequence[int]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as on both axes and better on one. ways: 1 where higher is better, -1 where lower is."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda p: (-ways[0] * p[0], -ways[1] * p[1])):
        if not kept or ways[1] * point[1] > ways[1] * kept[-1][1]:
            kept.append(point)
    return kept


def heat(systems: Sequence[System], baseline: int, cells: Sequence[Cell], opened: str | None) -> list[dict[str, Any]]:
    """A map of each task, metric and kind of language: differences to the baseline. The map of `opened`, a task/metric, is open."""
    maps = []
    wanted = [cell for cell in cells if cell[2] in LANGUAGES and better(cell[1]) and cell in systems[baseline].scores]
    for head in dict.fromkeys(cell[:3] for cell in wanted):
        rows = []
        for cell in (cell for cell in wanted if cell[:3] == head):
            start = systems[baseline].scores[cell].value
            rows.append((cell[3], [system.scores[cell].value - start if cell in system.scores else None for system in systems]))
        largest = max((abs(value) for _, values in rows for value in values if value is not None), default=0) or 1
        places = max(digits(systems, cell) for cell in wanted if cell[:3] == head)
        maps.append({"head": head, "rows": rows, "largest": largest, "digits": places, "open": "/".join(head[:2]) == opened})
    return maps


def digits(systems: Sequence[System], cell: Cell) -> int:
    """Decimals that a row of the table shows, intervals included: three of what is below 2, one of percentages."""
    found = [system.scores[cell] for system in systems if cell in system.scores]
    largest = max(abs(end) for score in found for end in (score.low, score.high))
    return 3 if largest < 2 else 2 if largest < 10 else 1


def as_csv(systems: Sequence[System]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["system", "task", "metric", "by", "group", "value", "low", "high", "count", "signature"])
    for system in systems:
        for cell, found in system.scores.items():
            writer.writerow([system.label, *cell, found.value, found.low, found.high, found.count, system.signatures.get(cell[:2], "")])
    return text.getvalue()


def marked(systems: Sequence[System], cell: Cell, found: Compared, bold: str, tie: str) -> list[str]:
    places = digits(systems, cell)
    cells = [f"{system.scores[cell].value:.{places}f}" if cell in system.scores else "–" for system in systems]
    return [bold.format(c) if i == found.best else c + tie if i in found.tied else c for i, c in enumerate(cells)]


def as_markdown(labels: Sequence[str], systems: Sequence[System], table: Sequence[tuple[Cell, Compared]], differ: Sequence[str]) -> str:
    heads = ["task", "metric", "group", *(" ".join(label.split()).replace("|", "\\|") for label in labels)]
    rows = [heads, ["---"] * 3 + ["---:"] * len(labels)]
    rows += [[cell[0], cell[1], cell[3], *marked(systems, cell, found, "**{}**", "=")] for cell, found in table]
    warning = f"Not scored alike (the signatures in tables.csv differ): {', '.join(differ)}.\n" if differ else ""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\nBold: best; =: tied with it.\n{warning}"


def as_latex(labels: Sequence[str], systems: Sequence[System], table: Sequence[tuple[Cell, Compared]]) -> str:
    rows = [[*map(latex, (*cell[:2], cell[3])), *marked(systems, cell, found, r"\textbf{{{}}}", r"$^{=}$")] for cell, found in table]
    body = "".join(f"{' & '.join(row)} \\\\\n".replace("–", "--") for row in rows)
    heads = " & ".join(map(latex, ("task", "metric", "group", *labels)))
    return f"\\begin{{tabular}}{{lll{'r' * len(labels)}}}\n\\hline\n{heads} \\\\\n\\hline\n{body}\\hline\n\\end{{tabular}}\n"


def latex(text: str) -> str:
    named = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar", "`": "asciigrave"}
    text = " ".join(text.split())
    return "".join(f"\\text{named[c]}{{}}" if c in named else f"\\{c}" if c in "&%$#_{}" else c for c in text)


if __name__ == "__main__":
    main()
