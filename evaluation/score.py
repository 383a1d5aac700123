"""Score translations in plain text files, one segment a line: one system, or several side by side.

    python -m evaluation.score --metric chrf --target de_DE --sources src.txt --references ref.txt --hypotheses a.txt b.txt
    python -m evaluation.score --metric Unbabel/wmt22-cometkiwi-da --sources src.txt --hypotheses a.txt b.txt --output scores

metric: chrf (chrF++), bleu or ter by sacrebleu, with its figures and signatures; or the folder or hub name of a neural metric
(evaluation/metrics/neural.py). Prints each system's score with its bootstrap interval; of several, their ranks and clusters as WMT
prints them, and p against the first by the paired bootstrap and by approximate randomization. `--output` keeps scores.json and, of a
neural metric, each segment's score, so that what was cut off goes on where it was.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from numpy.typing import NDArray

from evaluation.metrics import neural
from evaluation.metrics.bootstrap import Resampling, Value, counted, estimate, ratio
from evaluation.metrics.segment import Segment
from evaluation.metrics.significance import clusters, paired_bootstrap, paired_randomization
from evaluation.metrics.translation import bleu, bleu_statistics, chrf, chrf_statistics, ter, ter_statistics
from evaluation.store import Store
from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.data.locales import locale

NGRAM: dict[str, tuple[Callable, Value]] = {
    "chrf": (lambda found, references, target: chrf_statistics(found, references), chrf),
    "bleu": (bleu_statistics, bleu),
    "ter": (ter_statistics, ter),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--hypotheses", type=Path, nargs="+", required=True)
    parser.add_argument("--target", default="", help="locale of the translations, which chooses sacrebleu's tokenizer: de_DE")
    parser.add_argument("--assets", default="assets")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--precision", choices=list(neural.PRECISIONS), default="fp32", help="of a neural metric; comet-score has fp16")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch of a neural metric; a CPU takes 1,024 at most")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap resamples")
    asked = parser.parse_args()
    try:
        result = scored(asked)
    except InputError as error:
        refuse(error)
    print(table(result))
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "scores.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def scored(asked: argparse.Namespace) -> dict:
    """{"metric", "signature", "systems": best first, "against_first": p of each other}. Raises InputError."""
    if asked.samples < 1:
        raise InputError(f"--samples {asked.samples} makes no interval: give 1 or more, such as 1000")
    if asked.output and asked.output.exists() and not asked.output.is_dir():
        raise InputError(f"--output {asked.output} is a file: name a folder")
    how = Resampling(asked.samples)
    if asked.target:
        locale(asked.target)
    statistics, value, signature, lower = _ngram(asked) if asked.metric in NGRAM else _neural(asked)
    placed = clusters(statistics, value, how, lower)
    first, *others = statistics
    return {
        "metric": asked.metric,
        "signature": signature,
        "systems": [asdict(one) | asdict(estimate([statistics[one.name]], value, how)) for one in placed],
        "against_first": {
            other: {
                "paired_bootstrap": paired_bootstrap(statistics[first], statistics[other], value, how),
                "approximate_randomization": paired_randomization(statistics[first], statistics[other], value, how),
            }
            for other in others
        },
    }


def _ngram(asked: argparse.Namespace) -> tuple[dict[str, NDArray], Value, str, bool]:
    if asked.references is None:
        raise InputError(f"--metric {asked.metric} compares with references: give --references")
    if not asked.target and asked.metric != "chrf":
        raise InputError(f"--metric {asked.metric} has a tokenizer for each language: give --target, as in --target de_DE")
    references, systems = _lines(asked.references), _systems(asked, asked.references)
    counts, value = NGRAM[asked.metric]
    found = {name: counts(texts, references, asked.target) for name, texts in systems.items()}
    return {name: of for name, (of, _) in found.items()}, value, next(iter(found.values()))[1], asked.metric == "ter"


def _neural(asked: argparse.Namespace) -> tuple[dict[str, NDArray], Value, str, bool]:
    if asked.sources is None:
        raise InputError(f"--metric {asked.metric} reads the sources: give --sources")
    sources, systems = _lines(asked.sources), _systems(asked, asked.sources)
    references = [None] * len(sources) if asked.references is None else _lines(asked.references)
    _same_length(asked.sources, sources, asked.references, references)
    checkpoint = neural.find("metric", asked.metric, asked.assets, "--metric ", asked.precision)  # last, since it may fetch weights
    if checkpoint.needs_reference and asked.references is None:
        raise InputError(f"--metric {asked.metric} compares with references: give --references, or use a metric that needs none")
    segments = [Segment(*of) for texts in systems.values() for of in zip(sources, texts, references, strict=True)]
    with TemporaryDirectory() as scratch, Store((asked.output or Path(scratch)) / "segments.jsonl") as store:
        values = [checkpoint.scale * one["score"] for one in neural.score_segments(checkpoint, segments, store, asked.tokens)]
    found = {name: counted(values[at * len(sources) : (at + 1) * len(sources)]) for at, name in enumerate(systems)}
    return found, ratio, checkpoint.signature, checkpoint.kind == neural.METRICX


def _systems(asked: argparse.Namespace, beside: Path) -> dict[str, list[str]]:
    """Each hypothesis file's lines, as many as those of the file beside."""
    wanted, systems = _lines(beside), {}
    for path in asked.hypotheses:
        name = str(path)
        if name in systems:
            raise InputError(f"--hypotheses names {path} twice")
        systems[name] = _lines(path)
        _same_length(beside, wanted, path, systems[name])
    return systems


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}): give a text file in UTF-8, one segment a line") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty: give one segment a line")
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _same_length(one: Path, lines: Sequence, other: Path | None, others: Sequence) -> None:
    if len(lines) != len(others):
        raise InputError(f"{other} has {len(others)} lines and {one} has {len(lines)}: line n of both must be of the same segment")


def table(result: dict) -> str:
    rows = ["| cluster | rank | system | score | interval |", "|---:|---:|---|---:|---:|"]
    for one in result["systems"]:
        rank = str(one["best"]) if one["best"] == one["worst"] else f"{one['best']}-{one['worst']}"
        rows.append(f"| {one['cluster']} | {rank} | {one['name']} | {one['value']:.2f} | {one['low']:.2f} to {one['high']:.2f} |")
    for other, tests in result["against_first"].items():
        rows.append(f"{other} against the first: " + ", ".join(f"{name.replace('_', ' ')} p = {p:.4f}" for name, p in tests.items()))
    return "\n".join([*rows, result["signature"]])


if __name__ == "__main__":
    main()
