"""Which of two translations is better: how often the model agrees with people.

Rows are rated translations, as data/judgements.py reads them: mt_ranking.tsv or .jsonl (MQM, DA), or `RicardoRei/wmt-mqm-human-evaluation`.
Of each source one couple is asked, drawn by hash among those whose scores lie as far apart as the scale asks (GAPS: 1 of MQM, 25 of
DA; `score`: at all), so people's ties are not asked. A hash says which comes first. The prompt and what counts as a verdict are those of
the reward (rewards/preference.py): none, or both, is `unparsable` and wrong. `chose_a` is 50 for a model without a leaning to either place.
"""

from collections.abc import Sequence

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.store import digest
from evaluation.tasks import translation
from evaluation.tasks.sources import Published, place_of, rows_of
from evaluation.tasks.task import Answer, Score, Task, Verify, examples, groups_by, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data import judgements
from megatron_tower.rewards.preference import choice

NAME = "mt_ranking"
LABELS = ["A", "B"]


def part(task: str) -> Published:
    return Published(task, "RicardoRei/wmt-mqm-human-evaluation", None, "train", task)


def judged(cfg: EvalConfig, task: str) -> list[judgements.Judgement]:
    """Of the task's file, or of the hub."""
    place = place_of(cfg, task)
    if place is None:
        return judgements.gathered((f"{task}, row {number}", row) for number, row in enumerate(rows_of(cfg, part(task)), 1))
    found = next((path for path in (place, place / f"{task}.tsv", place / f"{task}.jsonl") if path.is_file()), None)
    if found is None:
        raise InputError(f"{task}: {place} holds neither {task}.tsv nor {task}.jsonl: name another, +eval.sources.{task}=...")
    return judgements.read(found)


def load(cfg: EvalConfig) -> list[Row]:
    rows = []
    for number, one in enumerate(judged(cfg, NAME), 1):
        couples = list(judgements.choices(one))
        if not couples:
            continue
        texts, best = min(couples, key=lambda couple: digest(one.source, couple[0]))
        rows.append(
            {
                "id": f"{NAME} {number}",
                "source_locale": one.source_locale,
                "target_locale": one.target_locale,
                "source": one.source,
                "translations": texts,
                "answer": LABELS[best],
            }
        )
    if not rows:
        raise InputError(f"{NAME}: no source has two translations that people scored apart: give it more of them")
    return rows


def instruction(row: Row) -> str:
    return judgements.ranking_prompt(row["source_locale"], row["source"], row["translations"])


def opening(row: Row) -> str:
    return f"{instruction(row)}\nAnswer:"


def shots(rows: Sequence[Row]) -> list[str]:
    return examples(rows, translation.pair, lambda one: f"{opening(one)} {one['answer']}", "source")


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"choice": A, B or None}."""
    return [answer | {"choice": choice(answer["output"], LABELS)} for answer in answers]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    scores = []
    for by, group, of in groups_by([row | {"pair": translation.pair(row)} for row in rows], "pair"):
        verdicts = [answers[i]["choice"] for i in of]
        right = [verdict == rows[i]["answer"] for verdict, i in zip(verdicts, of, strict=True)]
        scores.append(Score(NAME, "accuracy", by, group, percentage(right, how)))
        scores.append(Score(NAME, "unparsable", by, group, percentage([verdict is None for verdict in verdicts], how)))
        if given := [verdict for verdict in verdicts if verdict]:
            scores.append(Score(NAME, "chose_a", by, group, percentage([verdict == "A" for verdict in given], how)))
    return scores


MT_RANKING = Task(
    NAME,
    ("source", "answer"),
    "source",
    limited(translation.pair),
    score,
    instruction,
    opening,
    verify=verified,
    load=load,
    published=lambda cfg: [part(NAME)],
    decoding=Decoding(max_new_tokens=1024),
    shots=shots,
)
