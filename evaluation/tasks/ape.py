"""Automatic post-editing: a source and its machine translation -> a better translation, compared with what a person made of it.

Rows of your own, ape.jsonl: source, mt, post_edit, source_locale and target_locale, as `pairs.given` of tools/build_pairs.py takes them.
chrF++, BLEU and TER against the post-edit, over several pairs the mean of theirs, each beside that of the machine translation as it was
(`input_chrf`, ...): only what is better than that has gained anything. `unchanged` stands beside `input_exact_match`, the share that
needed no change. Leaves out: editing with a quality score or marked errors; WMT's own files, which are texts side by side, no JSONL.
"""

from collections.abc import Callable, Sequence

from numpy.typing import NDArray

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, Value, estimate, percentage
from evaluation.metrics.segment import Segment
from evaluation.metrics.translation import bleu, bleu_statistics, chrf, chrf_statistics, plain, ter, ter_statistics
from evaluation.tasks import translation
from evaluation.tasks.sources import Published, require, rows_of
from evaluation.tasks.task import Answer, Score, Task, examples, grouped, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.locales import find, locale

NAME = "ape"
PART = Published(NAME, None, None, "test", NAME)
Statistics = Callable[[list[str], list[str], str], tuple[NDArray, str]]
METRICS: dict[str, tuple[Statistics, Value]] = {
    "chrf": (lambda texts, references, target: chrf_statistics(texts, references), chrf),
    "bleu": (bleu_statistics, bleu),
    "ter": (ter_statistics, ter),
}


def load(cfg: EvalConfig) -> list[Row]:
    rows = []
    for number, row in enumerate(rows_of(cfg, PART), 1):
        require(row, ("source", "mt", "post_edit", "source_locale", "target_locale"), NAME, number)
        try:
            locales = {side: find(row[side]).code for side in ("source_locale", "target_locale")}
        except InputError as error:
            raise InputError(f"{NAME}, row {number}: {error}") from error
        texts = {"source": row["source"], "mt": row["mt"], "reference": row["post_edit"]}
        rows.append({"id": f"{NAME} {number}", **locales, **{name: text.strip() for name, text in texts.items()}})
    return rows


def instruction(row: Row) -> str:
    source, target = locale(row["source_locale"]).english, locale(row["target_locale"]).english
    return (
        f"Improve the following translation from {source} to {target}, correcting only what is wrong:\n"
        f"{source}: {row['source']}\n{target} translation: {row['mt']}\nImproved {target} translation: "
    )


def shots(rows: Sequence[Row]) -> list[str]:
    return examples(rows, translation.pair, lambda one: f"{instruction(one)}{one['reference']}", "source")


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    edited, before, after = translation.outputs(answers), [row["mt"] for row in rows], [row["reference"] for row in rows]
    pairs = grouped(rows, translation.pair)
    groups = [("all", "all", [*pairs]), *(("pair", name, [name]) for name in pairs)]
    scores = []
    for metric, (statistics, value) in METRICS.items():
        for name, texts in ((metric, edited), (f"input_{metric}", before)):
            found = {  # a pair at a time: the tokenizer is the target language's
                pair: statistics([texts[i] for i in of], [after[i] for i in of], rows[of[0]]["target_locale"]) for pair, of in pairs.items()
            }
            for by, group, inside in groups:
                signed = ", ".join(sorted({found[pair][1] for pair in inside}))
                scores.append(Score(NAME, name, by, group, estimate([found[pair][0] for pair in inside], value, how), signed))
    flags = {
        "unchanged": [plain(text) == plain(mt) for text, mt in zip(edited, before, strict=True)],
        "input_exact_match": [plain(mt) == plain(reference) for mt, reference in zip(before, after, strict=True)],
        "empty": [not text for text in edited],
        "truncated": [answer["finish"] == "length" for answer in answers],
    }
    for by, group, inside in groups:
        of = [i for pair in inside for i in pairs[pair]]
        scores += [Score(NAME, name, by, group, percentage([values[i] for i in of], how)) for name, values in flags.items()]
    return scores


def segments(rows: Sequence[Row], answers: Sequence[Answer]) -> list[Segment]:
    return [
        Segment(row["source"], text, row["reference"], (("pair", translation.pair(row)),))
        for row, text in zip(rows, translation.outputs(answers), strict=True)
    ]


APE = Task(
    NAME,
    ("source", "mt", "reference"),
    "source",
    limited(translation.pair),
    score,
    instruction,
    load=load,
    decoding=Decoding(max_new_tokens=1024),
    shots=shots,
    segments=segments,
)
