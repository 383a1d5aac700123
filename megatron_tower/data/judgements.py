"""Human judgements of translations (MQM, DA) as items that ask which of several translations is best.

    items(judgement)  ->  {"prompt": "Which translation is better, A or B?...", "reward": "preference", "check": {"best": "B", ...}}

Files: TSV with a header line (no quoting, as WMT writes them) or JSONL; one rated translation a line. Names, first found wins:
    source | src        target | translation | mt | hyp        score | da | mqm | penalty
    source_locale and target_locale, or lp ("en-de")           optional: doc, seg_id; more columns don't matter
A higher score is better: DA as it is, MQM as zero or negative, `penalty` for counts of errors (they are negated). Ratings of the same
translation are averaged. Leaves out: choosing what to train on, and ratings of whole documents.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import fmean

from megatron_tower.config import InputError
from megatron_tower.data import jsonl
from megatron_tower.data.damage import damage
from megatron_tower.data.locales import find, locale
from megatron_tower.data.pair import Pair

MISSING = "give a file of rated translations"
LABELS = "ABCDEFGH"  # I would be a pronoun
_SOURCE, _TARGET = ("source", "src"), ("target", "translation", "mt", "hyp")
# Scale of scores by column -> least difference that counts: 25 of 100 points is WMT's own for DA, 1 is a minor error of MQM.
GAPS = {"score": 0.0, "da": 25.0, "mqm": 1.0, "penalty": 1.0}


@dataclass(frozen=True)
class Judgement:
    """Translations of one source and their scores, higher is better, on `scale` (a key of GAPS)."""

    source_locale: str
    target_locale: str
    source: str
    translations: tuple[tuple[str, float], ...]  # distinct, in the file's order
    scale: str = "score"


def read(path: Path) -> list[Judgement]:
    """The judgements of a `.tsv` or `.jsonl` file, in its order; raises InputError with file and line for the first bad line."""
    if path.suffix not in (".tsv", ".jsonl"):
        raise InputError(f"{path}: judgements are read from .tsv or .jsonl, not {path.suffix or 'a file without suffix'}")
    if found := gathered(_rows(path)):
        return found
    raise InputError(f"{path} holds no judgement")


def gathered(rows: Iterable[tuple[str, dict]]) -> list[Judgement]:
    """The judgements of rows in the form of a file's, each with the place that an error names."""
    ratings: dict[tuple, dict[str, list[float]]] = {}
    for place, row in rows:
        segment, translation, score = _rating(place, row)
        ratings.setdefault(segment, {}).setdefault(translation, []).append(score)
    return [
        Judgement(*segment[:3], tuple((text, fmean(scores)) for text, scores in rated.items()), segment[3])
        for segment, rated in ratings.items()
    ]


def against_damaged(pair: Pair, rng: random.Random) -> Judgement | None:
    """A reference (1) against a damaged copy of it (0): what a demo without annotators has; None for a text too short to damage."""
    damaged = damage(pair.target, rng)
    return Judgement("en", pair.locale, pair.source, ((pair.target, 1.0), (damaged, 0.0))) if damaged else None


def items(
    judgement: Judgement, *, options: int = 2, gap: float | None = None, all_orders: bool = False, seed: int = 1234
) -> Iterator[dict]:
    """An item for each of `choices`."""
    for texts, best in choices(judgement, options=options, gap=gap, all_orders=all_orders, seed=seed):
        yield _item(judgement, texts, best)


def choices(
    judgement: Judgement, *, options: int = 2, gap: float | None = None, all_orders: bool = False, seed: int = 1234
) -> Iterator[tuple[list[str], int]]:
    """(translations as they are shown, which is best) for each set of `options` translations whose best leads every other by `gap`
    (null: GAPS of its scale), and by more than 0.

    A hash of the texts and `seed` says which label the best one gets, each equally often; `all_orders` gives one for every label.
    """
    if not 2 <= options <= len(LABELS):
        raise InputError(f"options={options}: show between 2 and {len(LABELS)} translations")
    least = GAPS[judgement.scale] if gap is None else gap
    for group in combinations(judgement.translations, options):
        (best, top), *others = sorted(group, key=lambda translation: -translation[1])
        lead = top - others[0][1]
        if lead <= 0 or lead < least:
            continue
        texts = sorted((text for text, _ in others), key=lambda text: _hash(seed, judgement.source, text))
        first = _hash(seed, judgement.source, best, *texts) % options
        for at in range(options) if all_orders else (first,):
            yield [*texts[:at], best, *texts[at:]], at


def ranking_prompt(source_locale: str, source: str, translations: Sequence[str]) -> str:
    """Which of the labelled translations is better (of two) or best (of more)."""
    labels = LABELS[: len(translations)]
    asked = "better" if len(labels) == 2 else "best"
    shown = "".join(f"\n{label}: {text}" for label, text in zip(labels, translations, strict=True))
    which = f"Which translation is {asked}, {', '.join(labels[:-1])} or {labels[-1]}?"
    return f"{which}\n{locale(source_locale).english}: {source}{shown}"


def _item(judgement: Judgement, texts: list[str], best: int) -> dict:
    foreign = judgement.source_locale if judgement.target_locale == "en" else judgement.target_locale
    return {
        "prompt": ranking_prompt(judgement.source_locale, judgement.source, texts),
        "reward": "preference",
        "family": f"preference_{len(texts)}",
        "locale": foreign,
        "answer": LABELS[best],
        "check": {"best": LABELS[best], "labels": list(LABELS[: len(texts)])},
    }


def _hash(seed: int, *texts: str) -> int:
    return int.from_bytes(sha256("\0".join((str(seed), *texts)).encode()).digest()[:8])


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """`file:line` and what the line says."""
    if path.suffix == ".jsonl":
        yield from jsonl.read(path, MISSING)
        return
    if not path.is_file():
        raise InputError(f"{path} is missing: {MISSING}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    numbered = [(f"{path}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    header = numbered[0][1].split("\t") if numbered else []
    for place, line in numbered[1:]:
        values = line.split("\t")
        if len(values) != len(header):
            raise InputError(f"{place}: {len(values)} columns where the header has {len(header)}: mend the line")
        yield place, dict(zip(header, values, strict=True))


def _rating(place: str, row: dict) -> tuple[tuple, str, float]:
    """What makes a segment one (locales, source and scale first), a translation of it, and its score, higher is better."""
    source_name, target_name, scale = (_named(place, row, names) for names in (_SOURCE, _TARGET, tuple(GAPS)))
    source, target = (_text(place, row, name) for name in (source_name, target_name))
    try:
        score = float(row[scale])
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{place}: {scale} is {row[scale]!r}, no number: drop the line")
    if scale == "mqm" and score > 0:
        raise InputError(
            f"{place}: mqm is {score}, but a higher score is better and 0 the best: name the column penalty if it counts errors"
        )
    if scale == "penalty":
        score = -score
    source_locale, target_locale = _locales(place, row)
    return (source_locale, target_locale, source, scale, str(row.get("doc")), str(row.get("seg_id"))), target, score


def _locales(place: str, row: dict) -> tuple[str, str]:
    if "source_locale" in row and "target_locale" in row:
        words = [row["source_locale"], row["target_locale"]]
    elif "lp" in row:
        words = str(row["lp"]).split("-")
    else:
        raise InputError(f"{place}: no source_locale and target_locale, nor lp: say which languages these are")
    if len(words) != 2:
        raise InputError(f"{place}: lp is {row['lp']!r}: write two languages as in en-de, or use source_locale and target_locale")
    try:
        source, target = (find(str(word)).code for word in words)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return source, target


def _named(place: str, row: dict, names: Sequence[str]) -> str:
    name = next((n for n in names if n in row), None)
    if name is None:
        raise InputError(f"{place}: none of {', '.join(names)} among {', '.join(row)}: name a column so")
    return name


def _text(place: str, row: dict, name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise InputError(f"{place}: {name} is empty or no text: drop the line")
    return row[name].strip()
