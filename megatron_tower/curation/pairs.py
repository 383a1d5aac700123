"""What makes a pair of texts unfit as a translation, one factory each: options -> drop(row) -> bool.

Options are thresholds; conf/data/curation/filters.yaml names them all, and `per_locale` there changes any for a target locale.
Most of these see that something is amiss without knowing what the words mean: what is fluent, of fitting length and simply another
sentence stays, and is for Bicleaner's scores and CometKiwi (scores.py) to find. docs/data.md has precision and recall.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import Indel

from megatron_tower.curation.shards import Row
from megatron_tower.curation.text import PER_WORD, Text, view
from megatron_tower.data.cleaning import LONG_ENOUGH, PLACEHOLDER, SURE, TAG
from megatron_tower.data.language import confusable, identify
from megatron_tower.data.pair import key

Drop = Callable[[Row], bool]
SIDES = ("source", "target")
_NUMBER = re.compile(r"(?<![\d.,])\d{1,3}(?:[.,'’\s]\d{2,3})*[.,'’\s]\d{3}(?!\d)|\d+")  # 1,234 and 1 234 are one, 2.5 is two
_DIGIT, _NOT_DIGIT = re.compile(r"\d"), re.compile(r"\D")
LONGEST_NUMBER = 18  # digits that are compared
_OTHER_UNITS = re.compile(r"\d\s*(?:[百千万萬亿億兆만억조천]|लाख|करोड़)")  # 1.2万 is 12,000: not worked out
_CLOSING = "\"'”’»«“‘„)]}）】』」›*_ "
_QUESTION = re.compile(r"[?？؟]$|か[。．]?$")
_END = tuple(".。．!！…।:：;；")


def _sides(row: Row) -> tuple[Text, Text]:
    return view(row["source"], row["source_locale"]), view(row["target"], row["target_locale"])


def length(shortest: int = 2, longest: int = 1000) -> Drop:
    """Columns, of either side."""
    return lambda row: any(not shortest <= side.columns <= longest for side in _sides(row))


def letters(least: float = 0.4) -> Drop:
    """Mostly no letters, on either side: addresses, code, tables."""
    return lambda row: any(side.letters < least * len(side.text.replace(" ", "")) for side in _sides(row))


def untranslated(similarity: float = 0.85, long_enough: int = 30) -> Drop:
    """The target is the source; or it has `long_enough` columns and this share of its characters, in the same order."""

    def drop(row: Row) -> bool:
        source, target = key(row["source"]), key(row["target"])
        if source == target:
            return True
        return len(target) >= long_enough and Indel.normalized_similarity(source, target, score_cutoff=similarity) > 0

    return drop


def length_ratio(most: float = 2.0, slack: int = 15) -> Drop:
    """One side is `most` times as wide as the other, and `slack` columns more."""

    def drop(row: Row) -> bool:
        short, long = sorted(side.columns for side in _sides(row))
        return long > most * short + slack

    return drop


def script(least: float = 0.1) -> Drop:
    """Fewer of a side's letters are of its language's script: names and terms may be of another."""
    return lambda row: any(side.script < least for side in _sides(row))


def language(sure: float = SURE, long_enough: int = LONG_ENOUGH) -> Drop:
    """A side has `long_enough` columns and is in another language, with `sure` probability."""

    def wrong(side: Text) -> bool:
        if side.columns < long_enough:
            return False
        label, score = identify(side.text, longest=len(side.text))
        return score >= sure and not confusable(label, side.language)

    return lambda row: any(map(wrong, _sides(row)))


def numbers(spelled: int = 12) -> Drop:
    """Numbers that one side alone has, in any digits, order and grouping; up to `spelled` they may be words or months on the other."""

    def drop(row: Row) -> bool:
        if not any(_DIGIT.search(row[side]) for side in SIDES):
            return False
        if any(_OTHER_UNITS.search(row[side]) for side in SIDES):
            return False
        source, target = (_numbers(row[side]) for side in SIDES)
        left, right = list((source - target).elements()), list((target - source).elements())
        for one in left[:]:
            other = next((other for other in right if _same(one, other)), None)
            if other is not None:
                left.remove(one)
                right.remove(other)
        return any(int(one) > spelled for one in left + right) or bool(left and right)

    return drop


def _numbers(text: str) -> Counter[str]:
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return Counter(_NOT_DIGIT.sub("", one).lstrip("0")[:LONGEST_NUMBER] or "0" for one in _NUMBER.findall(digits))


def _same(one: str, other: str) -> bool:
    """The hour on another clock, or a year without its century."""
    a, b = sorted((int(one), int(other)))
    return (b - a == 12 and b <= 24) or (len(str(b)) == 4 and b % 100 == a)


def markup() -> Drop:
    """Placeholders that are not the same on both sides, or another number of tags."""

    def drop(row: Row) -> bool:
        source, target = row["source"], row["target"]
        return _placeholders(source) != _placeholders(target) or _tags(source) != _tags(target)

    return drop


def _placeholders(text: str) -> list[str]:
    return sorted(found for found in PLACEHOLDER.findall(text) if not found[1:].isdigit())  # $5 is money


def _tags(text: str) -> int:
    return sum(1 for _ in TAG.finditer(text))


def punctuation(long_enough: int = 60) -> Drop:
    """Only one side is a question; or only one, of two with `long_enough` columns, ends as a sentence does: the other breaks off."""

    def drop(row: Row) -> bool:
        source, target = _sides(row)
        if (ending := _ending(source)) == (other := _ending(target)):
            return False
        return "?" in (ending, other) or max(source.columns, target.columns) >= long_enough

    return drop


def _ending(side: Text) -> str:
    text = side.text.rstrip(_CLOSING)
    if _QUESTION.search(text) or (text.endswith(";") and side.language == "el"):
        return "?"
    return "." if text.endswith(_END) else ""


def repetition(times: int = 4, phrase: int = 4) -> Drop:
    """Up to `phrase` words `times` times in a row on one side alone, as broken machine translation has them."""

    def stutters(side: Text, times: int) -> bool:
        words = side.words if side.spaced else [word for word in side.words if word.isalpha()]
        if len(words) - len(set(words)) < times - 1:
            return False
        return any(_run(words, n) >= n * (times - 1) for n in range(1, phrase * (1 if side.spaced else PER_WORD) + 1))

    def drop(row: Row) -> bool:
        source, target = _sides(row)
        return any(stutters(one, times) and not stutters(other, times - 1) for one, other in ((source, target), (target, source)))

    return drop


def _run(words: list[str], n: int) -> int:
    """Longest stretch of words each of which is the one n before it."""
    longest = run = 0
    for before, word in zip(words, words[n:], strict=False):
        run = run + 1 if before == word else 0
        longest = max(longest, run)
    return longest


def bicleaner(minimum: float = 0.5, score: str = "bicleaner") -> Drop:
    """A score that came with the pair is below `minimum`; a pair without one stays. EuroLLM has 0.5, and 0.6 for Portuguese."""
    return lambda row: row.get("scores", {}).get(score, minimum) < minimum


FILTERS: dict[str, Callable[..., Drop]] = {
    one.__name__: one
    for one in (bicleaner, length, letters, untranslated, length_ratio, script, markup, punctuation, numbers, repetition, language)
}
