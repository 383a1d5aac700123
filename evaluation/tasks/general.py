"""General instructions with one checkable answer: share answered exactly, over all and by kind and locale."""

from collections.abc import Sequence

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.metrics.translation import plain
from evaluation.tasks.task import Answer, Score, Task, grouped
from megatron_tower.config import EvalConfig
from megatron_tower.data.templates import INSTRUCTION


def instruction(row: Row) -> str:
    return row["prompt"]


def opening(row: Row) -> str:
    """A form that CPT's instruction-like text takes, up to where the answer begins."""
    return INSTRUCTION["question_answer/1"](row["prompt"], "").rstrip()


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, lambda row: "all", cfg.general)


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    right = [plain(answer["output"]) == plain(row["answer"]) for row, answer in zip(rows, answers, strict=True)]
    scores = []
    for by, key in (("all", lambda row: "all"), ("kind", lambda row: row["kind"]), ("locale", lambda row: row["locale"])):
        for group, of in grouped(rows, key).items():
            scores.append(Score("general", "accuracy", by, group, percentage([right[i] for i in of], how)))
    return scores


GENERAL = Task("general", ("kind", "prompt", "answer", "locale"), "prompt", chosen, score, instruction, opening)
