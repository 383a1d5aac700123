"""Tasks around translation as examples to learn from: `Taught` rows in the prompts that the evaluation asks.

    before   gec ner pii           from files in the form of the task of that name; pii has ner's form, types being kinds of personal data
             numbers casing        made from pairs (data/tasks.py)
    during   translation           from pairs, both ways            verifiable   with an instruction that can be checked (data/verifiable)
    after    ape mt_evaluation mt_ranking                from files: post-edits, and people's ratings (data/judgements.py)
             post_edit ranking quality                   made from pairs and damaged copies of them (data/tasks.py)

Answers are people's own: the first correction, the post-edit, the rating stretched over 0 to 100 within a file and pair, the better
translation. Leaves out: gec that damages text, for its errors would be none that people make.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.held_out import Row, choose
from evaluation.metrics.translation import plain
from evaluation.tasks import ape, gec, mt_evaluation, mt_ranking, ner
from evaluation.tasks.task import Task
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.config_sft import SftConfig, TextConfig
from megatron_tower.curation import pools
from megatron_tower.data import jsonl, tasks, verifiable
from megatron_tower.data.examples import Example
from megatron_tower.data.locales import find
from megatron_tower.data.pair import Pair, key
from megatron_tower.data.split import HeldOut

STAGES = {
    "before": ("gec", "ner", "pii", "numbers", "casing"),
    "during": ("translation", "verifiable"),
    "after": ("ape", "mt_evaluation", "mt_ranking", "post_edit", "ranking", "quality"),
}
PAIR = '{"source": "The sea.", "target": "Das Meer.", "source_locale": "en", "target_locale": "de_DE"}'


@dataclass(frozen=True)
class Taught:
    """id: where it comes from."""

    id: str
    licence: str
    kind: str
    locale: str
    prompt: str
    answer: str


def _entities(row: Row) -> str:
    return json.dumps([{"text": text, "type": kind} for text, kind in row["entities"]], ensure_ascii=False)


def _private(row: Row) -> str:
    kinds = ", ".join(f"[{kind}]" for kind in row["types"])
    return (
        f"Replace all personal data in the text below by what it is, one of {kinds}, and leave the rest as it is.\n"
        f"Text: {plain(row['text'])}\nWithout personal data: "
    )


def _anonymous(row: Row) -> str:
    """The longest first, so that a name inside an address does not cut it."""
    known = dict(row["entities"])
    either = "|".join(re.escape(text) for text in sorted(known, key=len, reverse=True))
    return re.sub(either, lambda found: f"[{known[found[0]]}]", plain(row["text"])) if known else plain(row["text"])


@dataclass(frozen=True)
class Form:
    """How rows of a file become examples."""

    task: Task
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]


FORMS = {
    "gec": Form(gec.GEC, gec.instruction, lambda row: row["corrections"][0]),
    "ner": Form(ner.NER, ner.instruction, _entities),
    "pii": Form(ner.NER, _private, _anonymous),
    "ape": Form(ape.APE, ape.instruction, lambda row: row["reference"]),
    "mt_evaluation": Form(mt_evaluation.MT_EVALUATION, mt_evaluation.instruction, lambda row: str(row["shown"])),
    "mt_ranking": Form(mt_ranking.MT_RANKING, mt_ranking.instruction, lambda row: row["answer"]),
}
FROM_PAIRS = (*tasks.KINDS, "verifiable")


def mixture(cfg: SftConfig, count: int, contaminated: Callable[[str], bool], seed: int) -> list[Taught]:
    """`count` examples by the weights of `cfg.tasks`, each prompt once, none of an evaluation set.

    Raises InputError for a task that has fewer than its share.
    """
    if not count:
        return []
    pairs = read_pairs(cfg.pairs) if any(name in FROM_PAIRS for name in cfg.tasks) else []
    wanted = _shared(count, {name: task.share for name, task in cfg.tasks.items()})
    examples: dict[str, Taught] = {}  # by what makes prompts the same
    for name, number in wanted.items():
        had = len(examples)
        for one in from_files(name, cfg.tasks[name].text) if name in FORMS else from_pairs(name, pairs, cfg.pairs.licence, number, seed):
            if len(examples) - had == number:
                break
            if not contaminated(f"{one.prompt}\n{one.answer}"):
                examples.setdefault(key(one.prompt), one)
        if (short := had + number - len(examples)) > 0:
            raise InputError(
                f"sft.tasks.{name} lacks {short} of the {number} examples that make its share: give it more text or a lower share, or "
                "lower sft.examples (no reply is lost)"
            )
    return list(examples.values())


def _shared(count: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `count`: what rounding down leaves goes to the largest remainders."""
    exact = {name: count * weight / sum(weights.values()) for name, weight in weights.items()}
    found = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: count - sum(found.values())]:
        found[name] += 1
    return found


def from_files(name: str, text: TextConfig) -> Iterator[Taught]:
    """In the order of a hash, so that the first few are a fair sample. Raises InputError for files that the task can't read."""
    form, found = FORMS[name], []
    for path in pools.files(text, f"sft.tasks.{name}.text"):
        try:
            rows = form.task.load(EvalConfig(sources={form.task.name: str(path)}))
        except InputError as error:
            raise InputError(f"sft.tasks.{name}.text: {path}: {error}") from error
        found += [row | {"file": path.name} for row in rows]
    for row in choose(found, lambda row: "", 0):
        number = row["id"].removeprefix(f"{form.task.name} ")
        locale = row.get("target_locale") or row["language"]
        yield Taught(f"{name}/{row['file']}:{number}", text.licence, name, locale, form.prompt(row).rstrip(), form.answer(row))


def from_pairs(name: str, pairs: Sequence[Pair], licence: str, count: int, seed: int) -> Iterator[Taught]:
    """At least `count` of them, unless the pairs run dry."""
    if name == "verifiable":
        spare = count // 10 + 10  # for those that turn out to be known or contaminated
        for number, item in enumerate(verifiable.generate(pairs, count + spare, seed), 1):
            yield _taught(f"verifiable/{number}", licence, verifiable.example(item))
        return
    for pair, example in tasks.stream(tasks.KINDS[name], pairs, random.Random(f"{seed}/{name}"), HeldOut(())):
        yield _taught(f"{name}/{pair.origin}", licence, example)


def _taught(name: str, licence: str, example: Example) -> Taught:
    return Taught(name, licence, example.kind, example.locale, example.prompt, example.answer)


def read_pairs(text: TextConfig) -> list[Pair]:
    """Raises InputError for a row that is no pair with an English side."""
    found = []
    for place, row in pools.rows(text, "sft.pairs"):
        jsonl.require_texts(row, ("source", "target", "target_locale"), place, PAIR)
        try:
            source, target = (find(code).code for code in (row.get("source_locale") or "en", row["target_locale"]))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if (source == "en") == (target == "en"):
            raise InputError(f"{place}: one of source_locale and target_locale must be en, they are {source} and {target}: drop the line")
        locale, english, foreign = (target, row["source"], row["target"]) if source == "en" else (source, row["target"], row["source"])
        found.append(Pair(locale, english, foreign, origin=Path(place).name))
    return found
