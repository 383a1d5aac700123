"""Translation of held-out sentences, en->xx and xx->en, in the released models' prompt.

chrF++ and BLEU over several pairs are the mean over pairs; exact match and the rates are shares of segments. `copy_chrf` is the
chrF++ that the untranslated source would get: a model that isn't above it has not learnt that pair.
Other tasks that translate score by the same `scorer`. Leaves out: neural metrics and TER, which sacrebleu takes long for on paragraphs
(both come after, by evaluation/neural.py).
"""

from collections.abc import Callable, Sequence
from functools import partial

from numpy.typing import NDArray

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, estimate, percentage
from evaluation.metrics.segment import Segment
from evaluation.metrics.translation import bleu, bleu_statistics, chrf, chrf_statistics, is_copied, is_wrong_language, plain
from evaluation.tasks.task import Answer, Score, Task, grouped
from megatron_tower.config import EvalConfig
from megatron_tower.data.templates import translation_prompt


def pair(row: Row) -> str:
    return f"{row['source_locale']}->{row['target_locale']}"


def direction(row: Row) -> str:
    return "en->xx" if row["source_locale"] == "en" else "xx->en" if row["target_locale"] == "en" else "xx->xx"


def instruction(row: Row) -> str:
    return translation_prompt(row["source_locale"], row["target_locale"], row["source"])


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, pair, cfg.translations_per_locale)


def outputs(answers: Sequence[Answer]) -> list[str]:
    return [answer["output"].strip() for answer in answers]


def pair_counts(rows: Sequence[Row], answers: Sequence[Answer]) -> list[NDArray]:
    """chrF++'s statistics of each pair's segments."""
    counts, _ = chrf_statistics(outputs(answers), [row["reference"] for row in rows])
    return [counts[of] for of in grouped(rows, pair).values()]


def exact_matches(rows: Sequence[Row], answers: Sequence[Answer]) -> list[bool]:
    return [plain(out) == plain(row["reference"]) for out, row in zip(outputs(answers), rows, strict=True)]


def scorer(task: str, part: str) -> Callable[[Sequence[Row], Sequence[Answer], Resampling], list[Score]]:
    """What scores a task's translations; part: the field that says which part of the task a row belongs to (kind, domain)."""
    return partial(_score, task, part)


def _score(task: str, part: str, rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    found = outputs(answers)
    sources, references = [row["source"] for row in rows], [row["reference"] for row in rows]
    counts, signature = chrf_statistics(found, references)
    copies, _ = chrf_statistics(sources, references)
    pairs = grouped(rows, pair)
    words = {}  # pair -> (statistics, signature): the tokenizer is the target language's
    for name, of in pairs.items():
        words[name] = bleu_statistics([found[i] for i in of], [references[i] for i in of], rows[of[0]]["target_locale"])
    flags: dict[str, list[bool | None]] = {
        "exact_match": exact_matches(rows, answers),
        "empty": [not out for out in found],
        "copied": [is_copied(*texts) for texts in zip(found, sources, references, strict=True)],
        "truncated": [answer.get("finish") == "length" for answer in answers],
        "wrong_language": [is_wrong_language(out, row["reference"], row["target_locale"]) for out, row in zip(found, rows, strict=True)],
    }

    def macro(by: str, key: Callable[[Row], str]) -> list[Score]:
        """Every metric for each group of pairs."""
        scores = []
        for group, of in grouped(rows, key).items():
            inside = {name: pairs[name] for name in sorted({pair(rows[i]) for i in of})}
            scores.append(Score(task, "chrf", by, group, estimate([counts[i] for i in inside.values()], chrf, how), signature))
            signed = ", ".join(sorted({words[name][1] for name in inside}))
            scores.append(Score(task, "bleu", by, group, estimate([words[name][0] for name in inside], bleu, how), signed))
            copied = estimate([copies[i] for i in inside.values()], chrf, how)
            scores.append(Score(task, "copy_chrf", by, group, copied, signature))
            for metric, values in flags.items():
                if judged := [values[i] for i in of if values[i] is not None]:
                    scores.append(Score(task, metric, by, group, percentage(judged, how)))
        return scores

    def pooled(by: str, key: Callable[[Row], str]) -> list[Score]:
        """chrF++ and exact match over the segments of each group, whatever their pair."""
        scores = []
        for group, of in grouped(rows, key).items():
            scores.append(Score(task, "chrf", by, group, estimate([counts[of]], chrf, how), signature))
            exact = percentage([flags["exact_match"][i] for i in of], how)
            scores.append(Score(task, "exact_match", by, group, exact))
        return scores

    return [
        *macro("all", lambda row: "all"),
        *macro("direction", direction),
        *macro("pair", pair),
        *pooled(part, lambda row: row[part]),
        *pooled(f"pair_{part}", lambda row: f"{pair(row)} {row[part]}"),
    ]


def segments(rows: Sequence[Row], answers: Sequence[Answer]) -> list[Segment]:
    """What neural metrics score."""
    groups = [(("direction", direction(row)), ("pair", pair(row)), ("kind", row["kind"])) for row in rows]
    texts = zip(rows, outputs(answers), groups, strict=True)
    return [Segment(row["source"], output, row["reference"], group) for row, output, group in texts]


FIELDS = ("kind", "source_locale", "target_locale", "source", "reference")
TRANSLATION = Task("translation", FIELDS, "source", chosen, scorer("translation", "kind"), instruction, segments=segments)
