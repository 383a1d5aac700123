"""What a task is: held-out rows -> what the model is asked -> its answers -> scores. One short file each beside this one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from evaluation.generators import Decoding
from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Estimate, Resampling
from evaluation.metrics.segment import Segment
from evaluation.tasks.sources import Published
from megatron_tower.config import EvalConfig

if TYPE_CHECKING:
    from evaluation.answers import Asker

SHOTS, SHOT_LENGTH = 3, 400  # worked examples; characters of one's text, at most

Answer = dict[str, Any]  # one line of generations.jsonl, beside the row's own fields


class Verdict(Protocol):
    """A reward's (megatron_tower/rewards/pool.py): a score from 0 to 1, or None and what the problem was."""

    score: float | None
    problem: str | None


Verify = Callable[[list[tuple[Row, str]]], Sequence[Verdict]]  # (item, answer) -> verdict


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
    load: rows of a benchmark, each with an "id" of its own; None: of held_out/<name>.jsonl. published: where they come from.
    decoding: None: greedy, eval.max_new_tokens. segments: what neural metrics score of the answers.
    instruction: the user's turn of a chat; opening: the same as the beginning of a text, for a model that has seen no chats, with the
    worked examples that `shots` gives for each row before it and `stop` to end the answer; None: the instruction without the space at
    its end, which belongs to the answer's first token. Without an instruction the text itself is scored for its likelihood. given: fields
    with answers to score for theirs; none is generated.
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
    published: Callable[[EvalConfig], Sequence[Published]] | None = None
    decoding: Decoding | None = None
    stop: tuple[str, ...] = ("\n",)
    shots: Callable[[Sequence[Row]], Sequence[str]] | None = None
    segments: Callable[[Sequence[Row], Sequence[Answer]], list[Segment]] | None = None

    def prompts(self, rows: Sequence[Row], chat: bool) -> list[str]:
        """What the model reads for each row; the text itself where it is scored for its likelihood."""
        if self.instruction is None:
            return [row[self.text] for row in rows]
        if chat:
            return [self.instruction(row) for row in rows]
        before = self.shots(rows) if self.shots else [""] * len(rows)
        opening = self.opening or (lambda row: self.instruction(row).rstrip())
        return [shots + opening(row) for shots, row in zip(before, rows, strict=True)]

    def ask(self, asker: "Asker", rows: Sequence[Row], usual: Decoding) -> list[Answer]:
        """{"output": text, "finish"} of each row, or {"bits", "tokens"} of its text, or {"<field>_logprob": nats a token} of each
        given answer. usual: how answers are decoded where the task doesn't say."""
        prompts = self.prompts(rows, asker.chat)
        if self.instruction is None:
            return [asdict(found) for found in asker.likelihood(prompts)]
        if not self.given:
            found = asker.generate(prompts, replace(self.decoding or usual, stop=() if asker.chat else self.stop))
            return [{"output": one.text, "finish": one.finish} | ({"problem": one.problem} if one.problem else {}) for one in found]
        found = [asker.answer_likelihood(prompts, [row[field] for row in rows]) for field in self.given]
        return [{f"{field}_logprob": f.logprob for field, f in zip(self.given, of, strict=True)} for of in zip(*found, strict=True)]


def limited(group: Callable[[Row], str]) -> Callable[[Sequence[Row], EvalConfig], list[Row]]:
    """The `choose` of a benchmark: eval.limit rows of each group."""
    return lambda rows, cfg: choose(rows, group, cfg.limit)


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


def examples(
    rows: Sequence[Row], group: Callable[[Row], str], shown: Callable[[Row], str], text: str, apart: str | None = None
) -> list[str]:
    """Before each row's opening, for a model that has seen no chats: other rows of its group as they are `shown`, with their answers.
    text: the field whose length is bounded; apart: the field in which an example must differ from the row (null: `text`), the same
    examples wherever they can be."""
    apart, texts = apart or text, []
    candidates = {name: [rows[i] for i in of if len(rows[i][text]) <= SHOT_LENGTH] for name, of in grouped(rows, group).items()}
    for row in rows:
        others = (one for one in candidates[group(row)] if one[apart] != row[apart])
        texts.append("".join(f"{shown(one)}\n\n" for one, _ in zip(others, range(SHOTS), strict=False)))
    return texts
