"""What became of a sweep: one table, one figure, and the commands that run its failed cells again.

    python -m tools.sweep runs/sweeps/mine

Writes sweep.md, sweep.csv and sweep.png there. Columns are the words that differ from cell to cell, and the figures that cells have in
common; a sweep calls this when its cells have ended, and it may be called while they run. Leaves out: the runs themselves.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from evaluation.findings import HEADLINES
from evaluation.systems import LOWER, better
from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.runtime import cells
from megatron_tower.runtime.cells import DONE, FAILED, Cell
from megatron_tower.runtime.job import EVALUATE
from megatron_tower.runtime.run_dir import write_text


@dataclass(frozen=True)
class Figure:
    """A number of a cell's file: its `key` there, how it is called, how many digits it has."""

    key: str
    title: str
    digits: int

    def show(self, cell: Cell) -> str:
        return f"{cell.numbers[self.key]:.{self.digits}f}" if self.key in cell.numbers else ""


TRAINED = (
    Figure("loss", "Loss, mean of the last tenth", 4),
    Figure("last loss", "Last loss", 4),
    Figure("reward", "Reward", 3),
    Figure("accuracy", "Pairs in order", 3),
    Figure("kl", "KL", 4),
    Figure("tokens_per_second", "Tokens a second", 0),
)
SCORED = tuple(Figure(f"{headline.task} {headline.metric}", headline.title + headline.unit, headline.digits) for headline in HEADLINES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        gather(folder)
    except InputError as error:
        refuse(error)


def gather(folder: Path) -> None:
    """Print and write all there is; InputError for a folder without cells."""
    found = cells.read(folder)
    if not found:
        raise InputError(f"{folder} holds no cells (<number>/cell.json): name the folder of a sweep, its hydra.sweep.dir")
    known = (*SCORED, *_others(found)) if found[0].module == EVALUATE else TRAINED
    figures = [figure for figure in known if any(figure.key in cell.numbers for cell in found)]
    rows = table(found, figures)
    _print(rows)
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    failed = [cell for cell in found if cell.state == FAILED]
    lines = [line for cell in failed for line in (f"cell {cell.folder.name}: {cell.reason}", f"  again: {cell.again}")]
    print(*lines, sep="\n")
    write_text(folder / "sweep.md", _markdown(folder, rows, failed))
    if figures and any(cell.state == DONE for cell in found):
        draw(found, figures, folder / "sweep.png")
    print(f"{sum(cell.state == DONE for cell in found)} of {len(found)} cells done: {folder / 'sweep.md'}")


def _others(found: Sequence[Cell]) -> list[Figure]:
    """What evaluations found beside the headlines: of benchmarks and neural metrics, rates of failure and lengths left out."""
    shown = {figure.key for figure in SCORED}
    keys = dict.fromkeys(key for cell in found for key in cell.numbers if key not in shown)
    return [Figure(key, key, 2) for key in keys if better(metric := key.partition(" ")[2]) and metric not in LOWER]


def table(found: Sequence[Cell], figures: Sequence[Figure]) -> list[list[str]]:
    """A head, then one row a cell."""
    keys = cells.swept(found)
    head = ["Cell", *(cells.short(key, keys) for key in keys), "State", *(figure.title for figure in figures), "Outputs"]
    return [
        head,
        *(
            [cell.folder.name, *(cell.values.get(key, "") for key in keys), cell.state, *(f.show(cell) for f in figures), cell.outputs]
            for cell in found
        ),
    ]


def _print(rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*(Column(title, overflow="fold") for title in rows[0]))
    for row in rows[1:]:
        shown.add_row(*row)
    Console(width=None if Console().is_terminal else 200, highlight=False, markup=False).print(shown)


def _markdown(folder: Path, rows: Sequence[Sequence[str]], failed: Sequence[Cell]) -> str:
    head, *body = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    lines = [f"# Sweep {folder.name}", "", head, "|" + " --- |" * len(rows[0]), *body]
    if failed:
        lines += ["", "## Failed cells", ""]
        for cell in failed:
            lines += [f"- {cell.folder.name}: {cell.reason}", "", f"      {cell.again}", ""]
    return "\n".join(lines).rstrip() + "\n"


def draw(found: Sequence[Cell], figures: Sequence[Figure], path: Path) -> None:
    """One panel a figure, against the first swept key that has numbers, a line for each choice of the others; else a point a cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from evaluation.figures import COLOURS, MARKERS, STYLE

    done, keys = [cell for cell in found if cell.state == DONE], cells.swept(found)
    scale = next((key for key in keys if all(_number(cell.values.get(key, "")) is not None for cell in done)), None)
    others = [key for key in keys if key != scale]
    lines = list(dict.fromkeys(cell.label(others) for cell in done)) if scale else []
    columns = min(len(figures), 3)
    down = math.ceil(len(figures) / columns)
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            down, columns, figsize=(3.4 * columns, 2.8 * down), squeeze=False, sharey=not scale, layout="constrained"
        )
        for axes, figure in zip(panels.flat, figures, strict=False):
            shown = [cell for cell in done if figure.key in cell.numbers]
            for number, line in enumerate(lines):
                points = sorted((float(cell.values[scale]), cell.numbers[figure.key]) for cell in shown if cell.label(others) == line)
                style = {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
                axes.plot(*zip(*points, strict=True), **style, label=line) if points else None
            if not scale:
                names = [_end(" ".join(cell.values.get(key, "") for key in keys)) for cell in shown]
                axes.plot([cell.numbers[figure.key] for cell in shown], names, "o", color=COLOURS[1])
            elif (values := [float(cell.values[scale]) for cell in done]) and min(values) > 0 and max(values) > 5 * min(values):
                axes.set_xscale("log")
            axes.set_title(figure.title, fontsize=9)
            axes.set_xlabel(scale or "")
        if not scale:
            panels[0][0].invert_yaxis()  # the first cell on top, in all panels
        if len(lines) > 1:
            panels[0][0].legend()
        for axes in panels.flat[len(figures) :]:
            axes.remove()
        drawn.savefig(path, dpi=150)
        plt.close(drawn)


def _end(label: str, most: int = 24) -> str:
    """Paths differ at their ends."""
    return label if len(label) <= most else f"…{label[-most:]}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
