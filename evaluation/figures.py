"""The reports' figures by matplotlib: small enough to be read on a phone, as PNG files and as SVG inside the page.

Leaves out: anything that isn't in the files they read.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from evaluation.metrics.bootstrap import Estimate
from evaluation.story import Stage, Story

COLOURS = ("#7a828c", "#1f6fb4", "#c2500a", "#2f7d4f", "#7b4ba0")  # one a stage, told apart by colour-blind readers and in print
MARKERS = ("o", "s", "D", "^", "v")
CURVES = {  # of metrics.jsonl
    "loss": "loss, nats a token",
    "margin": "margin",
    "accuracy": "pairs in order, share",
    "reward": "mean reward",
    "kl": "KL to its start, nats",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b636d",
    "axes.labelcolor": "#22272e",
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "report",  # the same figure is the same file
}
WIDTH = 4.4  # inches; 390 px show it near its own size


@plt.rc_context(STYLE)
def pareto(story: Story) -> Figure | None:
    """Translation against general, one point a stage with both intervals, stages joined in order; up and right is better.

    Of more than three stages the last three, which lie close together, have a second panel.
    """
    points = [(i, s, s.get("translation", "chrf"), s.get("general", "accuracy")) for i, s in enumerate(story.stages)]
    points = [p for p in points if p[2] and p[3]]
    if not points:
        return None
    shown = [points, points[-3:]] if len(points) > 3 else [points]
    figure, panels = plt.subplots(len(shown), figsize=(WIDTH, 0.3 + 3 * len(shown)), squeeze=False, layout="constrained")
    for axes, part in zip(panels.flat, shown, strict=True):
        _pareto(axes, part)
    panels[0][0].legend(loc="best")
    panels[-1][0].set_xlabel("translation: chrF++, mean over pairs →")
    return figure


def _pareto(axes: Axes, points: list[tuple[int, Stage, Estimate, Estimate]]) -> None:
    axes.plot([x.value for _, _, x, _ in points], [y.value for _, _, _, y in points], color="#aab2bc", linewidth=1.2, zorder=1)
    for i, stage, x, y in points:
        across, up = [[x.value - x.low], [x.high - x.value]], [[y.value - y.low], [y.high - y.value]]
        axes.errorbar(
            x.value,
            y.value,
            yerr=up,
            xerr=across,
            fmt=MARKERS[i],
            color=COLOURS[i],
            markersize=7,
            capsize=3,
            linewidth=1.3,
            label=stage.title,
        )
    axes.set_ylabel("general: exact answers, % →")
    axes.margins(0.08)


@plt.rc_context(STYLE)
def training(story: Story) -> Figure | None:
    """What each phase trains for, by step, two panels a row: raw pale, running mean over a fiftieth of the steps in full colour."""
    drawn = [(i, stage, key) for i, stage in enumerate(story.stages) if stage.curve for key in _curves(stage)]
    if not drawn:
        return None
    rows = -(-len(drawn) // 2)
    figure, panels = plt.subplots(rows, min(2, len(drawn)), figsize=(WIDTH, 0.4 + 2.1 * rows), squeeze=False, layout="constrained")
    for axes, (i, stage, key) in zip(panels.flat, drawn, strict=False):
        logged = [(row["step"], row[key]) for row in stage.curve if row.get(key) is not None]
        steps, values = zip(*logged, strict=True)
        axes.plot(steps, values, color=COLOURS[i], alpha=0.3, linewidth=0.8)
        axes.plot(steps, _running_mean(values, max(1, len(values) // 50)), color=COLOURS[i], linewidth=1.6)
        axes.set_title(f"{stage.title}: {CURVES[key]}", fontsize=8.5, loc="left")
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    return figure


def _curves(stage: Stage) -> list[str]:
    """The keys that tell how the stage's training went: its rewards, else its margins, else its loss."""
    logged = {key for row in stage.curve for key in row}
    for keys in (("reward", "kl"), ("margin", "accuracy")):
        if keys[0] in logged:
            return [key for key in keys if key in logged]
    return ["loss"]


@plt.rc_context(STYLE)
def bits(story: Story, ngrams: dict[str, dict[str, float]]) -> Figure | None:
    """Held-out bits per byte by locale: a point a stage with its interval, a tick for each n-gram model; left is better."""
    locales = story.groups("text", "bits_per_byte", "locale")
    if not locales:
        return None
    figure, axes = _axes(1.3 + 0.42 * len(locales))
    rows = range(len(locales))
    for (name, values), colour, line in zip(ngrams.items(), ("#22272e", "#22272e"), (":", "-"), strict=True):
        for row, locale in zip(rows, locales, strict=True):
            label = f"{name} model" if row == 0 else None
            axes.vlines(values[locale], row - 0.34, row + 0.34, colors=colour, linestyles=line, linewidth=1.4, label=label)
    for i, stage in enumerate(story.stages):
        offset = 0.18 * (i - (len(story.stages) - 1) / 2)
        for row, locale in zip(rows, locales, strict=True):
            if found := stage.get("text", "bits_per_byte", "locale", locale):
                spread = [[found.value - found.low], [found.high - found.value]]
                label = stage.title if row == 0 else None
                axes.errorbar(
                    found.value,
                    row + offset,
                    xerr=spread,
                    fmt=MARKERS[i],
                    color=COLOURS[i],
                    markersize=5,
                    capsize=2,
                    linewidth=1.1,
                    label=label,
                )
    axes.set_yticks(rows, locales)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("← held-out bits per byte")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@plt.rc_context(STYLE)
def save(figure: Figure, png: Path) -> str:
    """Write the PNG; return the figure as a data URI of its SVG, for a page without other files."""
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=200, metadata={"Software": None})
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()


def name_points(axes: Axes, points: Sequence[tuple[Estimate, Estimate, str]]) -> None:
    """Write each point's name beside it: inside the axes, over no other name and no point; over intervals, or nearer to another point, only
    where there is no room. Of the places around a point the nearest such one is taken; a thin line leads to it."""
    axes.figure.draw_without_rendering()  # the layout is settled by it
    unit = axes.figure.dpi / 72
    at = [axes.transData.transform((x.value, y.value)) for x, y, _ in points]
    covered = [Bbox.from_bounds(px - 5 * unit, py - 5 * unit, 10 * unit, 10 * unit) for px, py in at]
    spreads = [Bbox(axes.transData.transform(ends)) for x, y, _ in points for ends in _spreads(x, y)]
    for (px, py), (x, y, name) in zip(at, points, strict=True):

        def cost(box: Bbox, away: int, px: float = px, py: float = py) -> float:
            spoilt = sum(box.overlaps(other) for other in covered) + (not _holds(axes.bbox, box))
            strange = min(_away(box, *other) for other in at) < _away(box, px, py)
            return 100 * spoilt + 2 * sum(box.overlaps(other) for other in spreads) + 3 * strange + away / 6

        arrow = {"arrowstyle": "-", "color": "#8a929c", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        look = {"fontsize": 7.5, "color": "#22272e", "ha": "center", "va": "center", "arrowprops": arrow, "zorder": 5, "parse_math": False}
        text = axes.annotate(short(name), (x.value, y.value), xytext=(0, 0), textcoords="offset points", **look)
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = Text.get_window_extent(text)  # without the line
        wide, high = size.width / 2 + unit, size.height / 2 + unit
        places = []
        for away in range(6, 150, 6):
            for across, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
                cx, cy = px + across * (wide + away * unit * 0.7), py + up * (high + away * unit * 0.7)
                box = Bbox.from_extents(cx - wide, cy - high, cx + wide, cy + high)
                places.append((cost(box, away), len(places), box, (cx, cy)))
        *_, box, (cx, cy) = min(places)
        text.set_position(((cx - px) / unit, (cy - py) / unit))
        covered.append(box)


def short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}"


def _spreads(x: Estimate, y: Estimate) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Ends of a point's two intervals."""
    return [(x.low, y.value), (x.high, y.value)], [(x.value, y.low), (x.value, y.high)]


def _away(box: Bbox, x: float, y: float) -> float:
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _holds(outer: Bbox, inner: Bbox) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def _axes(height: float) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each step."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
