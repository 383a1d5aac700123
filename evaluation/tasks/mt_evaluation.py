"""How good a translation is, from 0 to 100 and without a reference: how well the model's numbers correlate with people's.

Rows as in mt_ranking, every rated translation one: mt_evaluation.tsv or .jsonl, or `RicardoRei/wmt-mqm-human-evaluation`. Pearson,
Spearman and Kendall's tau-b over all segments of a pair, not within a source; over several pairs the mean of theirs. A reply must give
one number from 0 to 100 ("85", "Score: 85/100", "I'd give it 85 out of 100."): anything else is `unparsable`, and counts as the mean of the
pair's other numbers, which says nothing and so weakens the correlation. A base model sees people's scores stretched over 0 to 100.
"""

import re
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.metrics.correlation import correlations
from evaluation.tasks import translation
from evaluation.tasks.mt_ranking import judged, part
from evaluation.tasks.task import Answer, Score, Task, Verify, examples, grouped, groups_by, limited
from megatron_tower.config import EvalConfig
from megatron_tower.data.locales import locale

NAME = "mt_evaluation"
_NUMBER = r"-?\d+(?:[.,]\d{1,2}(?!\d))?"
_SCALE = re.compile(r"\b0\s*(?:-|–|—|to|and)\s*100\b|(?:/|\bout of)\s*100\b")  # said of the scale, not on it
_NAMED = re.compile(rf"\b(?:score|rating|quality)\b[^\d\n-]{{0,30}}({_NUMBER})", re.IGNORECASE)


def load(cfg: EvalConfig) -> list[Row]:
    rows = []
    for number, one in enumerate(judged(cfg, NAME), 1):
        for place, (text, human) in enumerate(one.translations, 1):
            locales = {"source_locale": one.source_locale, "target_locale": one.target_locale}
            rows.append({"id": f"{NAME} {number} {place}", **locales, "source": one.source, "translation": text, "human": human})
    for of in grouped(rows, translation.pair).values():
        low, high = (limit(rows[i]["human"] for i in of) for limit in (min, max))
        for i in of:
            rows[i]["shown"] = round(100 * (rows[i]["human"] - low) / (high - low)) if high > low else 100
    return rows


def instruction(row: Row) -> str:
    source, target = locale(row["source_locale"]).english, locale(row["target_locale"]).english
    return (
        f"Score the quality of the following translation from {source} to {target} with one number from 0 (nothing of it is right) to 100 "
        f"(perfect):\n{source}: {row['source']}\n{target}: {row['translation']}\nScore: "
    )


def shots(rows: Sequence[Row]) -> list[str]:
    return examples(rows, translation.pair, lambda one: f"{instruction(one)}{one['shown']}", "source")


def rating(reply: str) -> float | None:
    """The one number from 0 to 100 that a reply gives: one that it calls a score, else the only one that it holds."""
    text = _SCALE.sub("", reply)
    found = {float(number.replace(",", ".")) for number in _NAMED.findall(text) or re.findall(_NUMBER, text)}
    return found.pop() if len(found) == 1 and 0 <= min(found) <= 100 else None


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"rating": 0 to 100, or None}."""
    return [answer | {"rating": rating(answer["output"])} for answer in answers]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    scores = []
    for by, group, of in groups_by([row | {"pair": translation.pair(row)} for row in rows], "pair"):
        scores.append(Score(NAME, "unparsable", by, group, percentage([answers[i]["rating"] is None for i in of], how)))
    pairs = {}
    for name, of in grouped(rows, translation.pair).items():
        given = [answers[i]["rating"] for i in of if answers[i]["rating"] is not None]
        middle = fmean(given) if given else 0.0
        ratings = [middle if answers[i]["rating"] is None else answers[i]["rating"] for i in of]
        pairs[name] = np.array([(ours, rows[i]["human"]) for ours, i in zip(ratings, of, strict=True)])
    for (kind, name), found in correlations(pairs, how).items():
        scores.append(Score(NAME, kind, "all" if name == "all" else "pair", name, found))
    return scores


MT_EVALUATION = Task(
    NAME,
    ("source", "translation"),
    "source",
    limited(translation.pair),
    score,
    instruction,
    verify=verified,
    load=load,
    published=lambda cfg: [part(NAME)],
    decoding=Decoding(max_new_tokens=512),
    shots=shots,
)
