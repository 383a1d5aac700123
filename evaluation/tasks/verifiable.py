"""Instructions whose answers a rule can check: mean reward of greedy answers, in %, over all and by reward, family and locale.

The rewards are those that GRPO trains on (megatron_tower/rewards); the items are held out. An answer without a verdict (the
checker ran out of time or failed) counts neither for nor against: `no_verdict` is their share, also by problem.
"""

from collections.abc import Sequence

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.tasks.general import instruction, opening
from evaluation.tasks.task import Answer, Score, Task, Verify, groups_by
from megatron_tower.config import EvalConfig
from megatron_tower.data.prompts import family


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, lambda row: "all", cfg.verifiable)


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with the rewards' {"score", "problem"}."""
    verdicts = verify([(row, answer["output"]) for row, answer in zip(rows, answers, strict=True)])
    return [answer | {"score": v.score, "problem": v.problem} for answer, v in zip(answers, verdicts, strict=True)]


def rewards(rows: Sequence[Row], answers: Sequence[Answer]) -> list[float | None]:
    return [answer["score"] for answer in answers]


def problems(answers: Sequence[Answer]) -> list[str | None]:
    """timeout, error or nan, without what an error says; None beside a verdict."""
    return [answer["problem"] and answer["problem"].split(":")[0] for answer in answers]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    found = rewards(rows, answers)
    scores = [Score("verifiable", "no_verdict", "all", "all", percentage([reward is None for reward in found], how))]
    met = problems(answers)
    for problem in sorted({*met} - {None}):
        scores.append(Score("verifiable", "no_verdict", "problem", problem, percentage([p == problem for p in met], how)))
    for by, group, of in groups_by([row | {"family": family(row)} for row in rows], "reward", "family", "locale"):
        if judged := [found[i] for i in of if found[i] is not None]:
            scores.append(Score("verifiable", "reward", by, group, percentage(judged, how)))
    return scores


FIELDS = ("prompt", "reward", "family", "locale")
VERIFIABLE = Task("verifiable", FIELDS, "prompt", chosen, score, instruction, opening, verify=verified)
