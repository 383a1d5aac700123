"""Preference between two given answers: how often the better one is the more probable, a token for a token.

An answer's figure is the mean log-probability of its tokens and end of turn given the prompt, in nats; the margin is the chosen
answer's less the rejected one's. A tie counts half. A model that has seen no chats reads the prompt as the opening of a text.
"""

from collections.abc import Sequence

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, mean, percentage
from evaluation.tasks.general import instruction, opening
from evaluation.tasks.task import Answer, Score, Task, groups_by
from megatron_tower.config import EvalConfig


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, lambda row: "all", cfg.preference)


def margins(answers: Sequence[Answer]) -> list[float]:
    return [answer["chosen_logprob"] - answer["rejected_logprob"] for answer in answers]


def wins(rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
    """1 where the chosen answer is the more probable, 0 where the rejected one is, 1/2 for a tie."""
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins(answers)]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    won, apart = wins(rows, answers), margins(answers)
    scores = []
    for by, group, of in groups_by(rows, "kind", "locale"):
        scores.append(Score("preference", "accuracy", by, group, percentage([won[i] for i in of], how)))
        scores.append(Score("preference", "margin", by, group, mean([apart[i] for i in of], how)))
    return scores


FIELDS = ("kind", "locale", "prompt", "chosen", "rejected")
PREFERENCE = Task("preference", FIELDS, "prompt", chosen, score, instruction, opening, given=("chosen", "rejected"))
