"""Translation-related examples for SFT, before, during and after translation, all with one checkable answer.

    before   numbers     copy the numbers of a sentence            casing   restore its capital letters
    during   translation both ways, in the released models' prompt
    after    post_edit   mend a damaged translation                ranking  which of two is better     quality  OK or BAD

Made from training pairs only; an example in which damage happens to spell a held-out string is dropped.
Leaves out: tasks that need models or annotators (PII, quality scores, grammatical errors as people make them).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from megatron_tower.data.damage import damage
from megatron_tower.data.examples import Example
from megatron_tower.data.judgements import ranking_prompt
from megatron_tower.data.locales import locale
from megatron_tower.data.pair import Pair
from megatron_tower.data.split import HeldOut
from megatron_tower.data.templates import translation_prompt

_DIGITS = re.compile(r"\d+(?:[.,:]\d+)*")


def _translation(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    sides = [("en", pair.source), (pair.locale, pair.target)]
    (source, text), (target, answer) = sides if rng.random() < 0.5 else reversed(sides)
    return _example("translation", pair, translation_prompt(source, target, text), answer)


def _numbers(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    text = rng.choice((pair.source, pair.target))
    found = _DIGITS.findall(text)
    return _example("numbers", pair, f"Copy the numbers of this text: {text}", " ".join(found)) if found else None


def _casing(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    text = rng.choice((pair.source, pair.target))
    return None if text == text.lower() else _example("casing", pair, f"Restore the capital letters: {text.lower()}", text)


def _post_edit(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    damaged = damage(pair.target, rng)
    prompt = f"Correct the {locale(pair.locale).english} translation.\n{_shown(pair, damaged)}"
    return _example("post_edit", pair, prompt, pair.target) if damaged else None


def _ranking(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    worse = _worse(pair, others, rng)
    if worse is None:
        return None
    options = [pair.target, worse]
    rng.shuffle(options)
    prompt = ranking_prompt("en", pair.source, options)
    return _example("ranking", pair, prompt, "AB"[options.index(pair.target)])


def _quality(pair: Pair, others: Sequence[Pair], rng: random.Random) -> Example | None:
    good = rng.random() < 0.5
    shown = pair.target if good else _worse(pair, others, rng)
    return _example("quality", pair, f"Is this translation OK or BAD?\n{_shown(pair, shown)}", "OK" if good else "BAD") if shown else None


Task = Callable[[Pair, Sequence[Pair], random.Random], Example | None]
# Of the translation-related examples.   ours
SHARES: dict[Task, float] = {_translation: 0.7, _numbers: 0.06, _casing: 0.06, _post_edit: 0.06, _ranking: 0.06, _quality: 0.06}
KINDS: dict[str, Task] = {task.__name__.removeprefix("_"): task for task in SHARES}


def generate(pairs: Sequence[Pair], count: int, seed: int, held: HeldOut) -> list[Example]:
    """`count` distinct examples from training pairs, by `SHARES`, the same for the same seed; fewer when the pairs run dry."""
    wanted = {task: round(count * share) for task, share in SHARES.items()}
    wanted[_translation] += count - sum(wanted.values())  # what rounding left
    examples: list[Example] = []
    for task, number in wanted.items():
        rng = random.Random(f"{seed}/{task.__name__}")
        examples += (example for _, example in islice(stream(task, pairs, rng, held), number))
    return examples


def stream(task: Task, pairs: Sequence[Pair], rng: random.Random, held: HeldOut) -> Iterator[tuple[Pair, Example]]:
    """Twice over the pairs in random order, each example once, with the pair that it is made from."""
    by_locale: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_locale.setdefault(pair.locale, []).append(pair)
    seen: set[str] = set()
    for _ in range(2):
        for pair in rng.sample(pairs, len(pairs)):
            example = task(pair, by_locale[pair.locale], rng)
            if example and example.prompt not in seen and not held.leaks(example.prompt) and not held.leaks(example.answer):
                seen.add(example.prompt)
                yield pair, example


def _worse(pair: Pair, others: Sequence[Pair], rng: random.Random) -> str | None:
    """A damaged translation, or that of another source."""
    return (
        damage(pair.target, rng) if rng.random() < 0.5 else next((o.target for o in [rng.choice(others)] if o.target != pair.target), None)
    )


def _shown(pair: Pair, translation: str | None) -> str:
    return f"English: {pair.source}\n{locale(pair.locale).english}: {translation}"


def _example(kind: str, pair: Pair, prompt: str, answer: str) -> Example:
    return Example(prompt, answer, "translation", kind, pair.locale)
