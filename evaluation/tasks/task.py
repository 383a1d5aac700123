"""What a task is: held-out rows -> what the model is asked -> its answers -> scores. One short file each beside this one."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Estimate, Resampling
from evaluation.metrics.segment import Segment
from megatron_tower.config import EvalConfig

Answer = dict[str, Any]  # one line of generations.jsonl, beside the row's own fields


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text and its end, in bits, and the number of tokens it is summed over."""

    bits: float
    tokens: int

    @property
    def logprob(self) -> float:
        """Mean log-probability of a token, in nats."""
        return -self.bits * math.log(2) / self.tokens


class Verdict(Protocol):
    """A reward's (megatron_tower/rewards/pool.py): a score from 0 to 1, or None and what the problem was."""

    score: float | None
    problem: str | None


Verify = Callable[[list[tuple[Row, str]]], Sequence[Verdict]]  # (item, answer) -> verdict


class Generator(Protocol):
    """What answers: a checkpoint here, a stand-in in the tests. chat: whether it is asked in chat turns or goes on with a text."""

    chat: bool

    def generate(self, prompts: Sequence[str]) -> list[str]: ...

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]: ...

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]: ...


@dataclass(frozen=True)
class Score:
    """One cell of the table. `by` says how segments were grouped (all, locale, kind, ...), `group` which group it is."""

    task: str
    metric: str
    by: str
    group: str
    estimate: Estimate
    signature: str = ""  # sacrebleu's, where it is sacrebleu's metric


@dataclass(frozen=True)
class Task:
    """name: in eval.tasks, and of held_out/<name>.jsonl; fields: what each line must hold; text: the field that the model reads.
    load: rows of a benchmark, each with an "id" of its own, from eval.sources or the hub; None: of held_out/<name>.jsonl.
    decoding: None: greedy, eval.max_new_tokens. segments: what neural metrics score of the answers.
    instruction: the user's turn of a chat; opening: the same as the beginning of a text, for a model that has seen no chats.
    Without them the text itself is scored for its likelihood. given: fields with answers to score for theirs; none is generated.
    verify: adds to each answer what the rewards say of it."""

    name: str
    fields: tuple[str, ...]
    text: str
    choose: Callable[[Sequence[Row], EvalConfig], list[Row]]
    score: Callable[[Sequence[Row], Sequence[Answer], Resampling], list[Score]]
    instruction: Callable[[Row], str] | None = None
    opening: Callable[[Row], str] | None = None
    given: tuple[str, ...] = ()
    verify: Callable[[Sequence[Row], Sequence[Answer], Verify], list[Answer]] | None = None
    load: Callable[[EvalConfig], list[Row]] | None = None
    decoding: Decoding | None = None
    segments: Callable[[Sequence[Row], Sequence[Answer]], list[Segment]] | None = None

    def prompt(self, row: Row, chat: bool) -> str | None:
        words = self.instruction if chat else self.opening
        return words(row) if words else None

    def ask(self, generator: Generator, rows: Sequence[Row]) -> list[Answer]:
        """{"output": text} of each row, or {"bits", "tokens"} of its text, or {"<field>_logprob": nats a token} of each given answer."""
        if self.instruction is None:
            return [asdict(found) for found in generator.likelihood([row[self.text] for row in rows])]
        prompts = [self.prompt(row, generator.chat) for row in rows]
        if not self.given:
            return [{"output": text} for text in generator.generate(prompts)]
        found = [generator.answer_likelihood(prompts, [row[field] for row in rows]) for field in self.given]
        return [{f"{field}_logprob": f.logprob for field, f in zip(self.given, of, strict=True)} for of in zip(*found, strict=True)]


def groups_by(rows: Sequence[Row], *fields: str) -> Iterator[tuple[str, str, list[int]]]:
    """(by, group, indices of its rows): all rows first, then those of each value of each field."""
    yield "all", "all", list(range(len(rows)))
    for field in fields:
        for group, of in grouped(rows, lambda row, field=field: row[field]).items():
            yield field, group, of


def grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[int]]:
    """Indices of the rows of each group, groups in sorted order."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(key(row), []).append(index)
    return dict(sorted(groups.items()))
