"""What a family of checkable instructions is: it proposes, it checks, and it knows how its constraint gets broken.

A constraint is a JSON object `{"family": name, "form": ..., parameters}`; a case is what it is checked against:
`{"source", "source_locale", "target_locale", "reference" (text or null), "constraints"}`.
"""

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from megatron_tower.data.locales import locale
from megatron_tower.data.pair import key, plain

VALUES = ("date", "time", "number", "money", "unit", "relative_time")  # kinds of pairs that are one value and nothing else


@dataclass(frozen=True)
class Draft:
    """A translation on its way to becoming an item; families change its two texts together.

    english: the pair's own English side, from which a value is read. kind: the pair's kind.
    terms: (source, target) of shorter pairs found inside it. others: (source, target) of more pairs of the locale.
    """

    source_locale: str
    target_locale: str
    source: str
    reference: str
    english: str
    kind: str
    terms: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    @property
    def is_value(self) -> bool:
        return self.kind in VALUES

    def appended(self, source: str, reference: str) -> "Draft":
        return replace(self, source=f"{self.source} ({source})", reference=f"{self.reference} ({reference})")


Proposal = tuple[Draft, dict] | None


@dataclass(frozen=True)
class Family:
    """propose(draft, rng): the changed draft and the constraint's parameters, or None where the family does not apply.
    check(constraint, answer, case): is it kept?  damage(constraint, answer, case): named variants of a right answer that break it.
    needs: the parameters a constraint must have, each with what makes a value of it valid.
    excludes: families it can't be composed with.
    """

    name: str
    propose: Callable[[Draft, random.Random], Proposal]
    check: Callable[[dict, str, dict], bool]
    damage: Callable[[dict, str, dict], dict[str, str]]
    needs: dict[str, Callable[[object], bool]] = field(default_factory=dict)
    excludes: frozenset[str] = frozenset()


def is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def is_texts(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(is_text, value))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def one_of(options: Collection[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in options


def cldr(code: str) -> str:
    return locale(code).cldr


def contains(text: str, form: str) -> bool:
    """Whether a value stands in the text as written in `form`: case and the kind of space don't count, nor whether there is one.

    "1.234" does not stand in "11.234", "1.234,5" or "1.2345", nor "5 EUR" in "5 euros".
    """
    spelt = r"\s?".join(re.escape(part) for part in key(form).split(" "))
    before, after = (r"(?<![^\W\d])" if has_case(form[0]) else ""), (r"(?![^\W\d])" if has_case(form[-1]) else "")
    return re.search(rf"(?<!\d)(?<!\d[.,]){before}{spelt}{after}(?![.,]?\d)", key(text)) is not None


def has_case(character: str) -> bool:
    """Whether its script has capitals; there, spaces divide words too."""
    return character.upper() != character.lower()


def swapped(text: str, old: str, new: str) -> str:
    """`old` replaced by `new` whatever its case; the text with `new` behind it where `old` isn't found."""
    changed = re.sub(re.escape(plain(old)), lambda _: new, plain(text), count=1, flags=re.IGNORECASE)
    return changed if changed != plain(text) else f"{text} {new}"


def misread(digits: str) -> str:
    """The same with every digit d as 9 - d: another value in the same form."""
    return re.sub(r"\d", lambda digit: str(9 - int(digit[0])), digits)
