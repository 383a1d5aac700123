"""General instructions with one checkable answer: share answered exactly, over all and by kind and locale."""

from collections.abc import Sequence

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.metrics.translation import plain
from evaluation.tasks.task import Answer, Score, Task, groups_by
from megatron_tower.config import EvalConfig
from megatron_tower.data.templates import INSTRUCTION


def instruction(row: Row) -> str:
    return row["prompt"]


def opening(row: Row) -> str:
    """A form that CPT's text takes, up to where the answer begins: a question, unless the prompt is itself left open by a colon."""
    prompt = row["prompt"].rstrip()
    return prompt if prompt.endswith(":") else INSTRUCTION["question_answer/1"](prompt, "").rstrip()


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, lambda row: "all", cfg.general)


def right_answers(rows: Sequence[Row], answers: Sequence[Answer]) -> list[bool]:
    return [plain(answer["output"]) == plain(row["answer"]) for row, answer in zip(rows, answers, strict=True)]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    right = right_answers(rows, answers)
    return [
        Score("general", "accuracy", by, group, percentage([right[i] for i in of], how))
        for by, group, of in groups_by(rows, "kind", "locale")
    ]


GENERAL = Task("general", ("kind", "prompt", "answer", "locale"), "prompt", chosen, score, instruction, opening)
