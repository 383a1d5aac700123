"""From pairs to verifiable translation items: draw families, let each change the draft in turn, say it in words, check it.

generate(pairs, count=1000, seed=7)                             # everything
generate(pairs, 200, 7, families=["date", "json"], composed=0)  # these two, one at a time
"""

import random
from collections.abc import Sequence

from megatron_tower.config import InputError
from megatron_tower.data.examples import Example
from megatron_tower.data.pair import Pair, key
from megatron_tower.data.split import words
from megatron_tower.data.templates import translation_prompt
from megatron_tower.data.verifiable.checking import kept
from megatron_tower.data.verifiable.families import FAMILIES, compatible
from megatron_tower.data.verifiable.family import Draft
from megatron_tower.data.verifiable.shape import dressed
from megatron_tower.data.verifiable.wording import instruction

REVERSED = 0.15  # share of items that translate into English   ours
PATIENCE = 60  # pairs tried for one choice of families, which a pair may not fit
FRUITLESS = 20  # choices in a row without an item: the pairs have run dry


def generate(
    pairs: Sequence[Pair], count: int, seed: int, *, families: Sequence[str] | None = None, composed: float = 0.3, own_language: float = 0.3
) -> list[dict]:
    """`count` items with distinct prompts, the same for the same seed; fewer when the pairs run dry.

    composed, own_language: shares of items with two or three constraints, and with instructions in the target's language.
    Each item also carries the constraint `bare`. Raises InputError for an unknown family.
    """
    names = list(families or FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise InputError(f"families: {unknown[0]} is unknown: use some of {', '.join(FAMILIES)}")
    rng, terms = random.Random(f"{seed}/verifiable"), _Glossaries(pairs)
    items: dict[str, dict] = {}
    fruitless = 0
    while pairs and len(items) < count and fruitless < FRUITLESS:
        chosen = _choice(names, composed, rng)
        own = rng.random() < own_language
        for _ in range(PATIENCE):
            item = _item(rng.choice(pairs), terms, chosen, own, rng)
            if item and item["prompt"] not in items:
                items[item["prompt"]] = item
                fruitless = 0
                break
        else:
            fruitless += 1
    return list(items.values())


def example(item: dict) -> Example:
    """The item as an example to learn from: its prompt and its reference answer."""
    return Example(item["prompt"], item["answer"], "translation", "verifiable", item["locale"])


def _choice(names: list[str], composed: float, rng: random.Random) -> tuple[str, ...]:
    """One family, or two or three that go together, in the order of `FAMILIES`."""
    size = rng.choice((2, 2, 3)) if rng.random() < composed else 1
    chosen = rng.sample(names, min(size, len(names)))
    while not compatible(tuple(chosen)):
        chosen.pop()
    return tuple(name for name in FAMILIES if name in chosen)


class _Glossaries:
    """For each locale, the short pairs (up to three words) by their English words, and all pairs."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.short: dict[str, dict[tuple[str, ...], Pair]] = {}
        self.all: dict[str, list[Pair]] = {}
        for pair in pairs:
            self.all.setdefault(pair.locale, []).append(pair)
            if pair.kind in ("catalogue", "territory", "language", "currency") and 0 < len(run := words(pair.source)) <= 3:
                self.short.setdefault(pair.locale, {}).setdefault(run, pair)

    def inside(self, pair: Pair) -> list[Pair]:
        """Short pairs both of whose sides stand in this longer one."""
        run, known = words(pair.source), self.short.get(pair.locale, {})
        spans = {run[i : i + n] for n in (1, 2, 3) for i in range(len(run) - n + 1)} - {run}
        found = [known[span] for span in sorted(spans) if span in known]
        return [short for short in found if f" {key(short.target)} " in f" {key(pair.target)} " and key(short.source) != key(short.target)]


def _item(pair: Pair, glossaries: _Glossaries, families: tuple[str, ...], own_language: bool, rng: random.Random) -> dict | None:
    """None where a family does not apply to the pair, or the answer would fail its own check or equal the source."""
    draft = _draft(pair, glossaries, rng)
    constraints = []
    for name in families:
        proposal = FAMILIES[name].propose(draft, rng)
        if proposal is None:
            return None
        draft, parameters = proposal
        constraints.append({"family": name, **parameters})
    asked = instruction(constraints, draft.target_locale, own_language=own_language)
    if "bare" not in families:
        constraints.append({"family": "bare"})
    case = {
        "source": draft.source,
        "source_locale": draft.source_locale,
        "target_locale": draft.target_locale,
        "reference": draft.reference,
        "constraints": constraints,
    }
    answer = dressed(case, draft.reference)
    same = key(draft.source).replace(" ", "") == key(draft.reference).replace(" ", "")
    if same or len(draft.reference) < 2 or not all(kept(case, answer)):
        return None
    return {
        "prompt": f"{asked}\n{translation_prompt(draft.source_locale, draft.target_locale, draft.source)}",
        "reward": "translation",
        "family": "+".join(families),
        "locale": pair.locale,
        "origin": pair.origin,
        "answer": answer,
        "check": case,
    }


def _draft(pair: Pair, glossaries: _Glossaries, rng: random.Random) -> Draft:
    """The pair in one of its two directions, with what else of its locale a family may need."""
    terms = [(short.source, short.target) for short in glossaries.inside(pair)]
    others = rng.sample(glossaries.all[pair.locale], min(4, len(glossaries.all[pair.locale])))
    more = [(other.source, other.target) for other in others if other.source != pair.source][:3]
    if rng.random() < REVERSED:
        turned = [(b, a) for a, b in terms], [(b, a) for a, b in more]
        return Draft(pair.locale, "en", pair.target, pair.source, pair.source, pair.kind, *map(tuple, turned))
    return Draft("en", pair.locale, pair.source, pair.target, pair.source, pair.kind, tuple(terms), tuple(more))
