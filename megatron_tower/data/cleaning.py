"""What makes a catalogue entry unfit for training, one named function each; the manifest counts what each removed.

A filter answers "drop this pair?". They run in the order of `FILTERS`; a pair counts for the first that drops it.
Leaves out: learned quality estimation (CometKiwi, Bicleaner), which real corpora need.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from megatron_tower.data.language import confusable, identify
from megatron_tower.data.locales import LOCALES
from megatron_tower.data.pair import Pair, key, plain

PLACEHOLDER = re.compile(r"%\(\w+\)|%[-+#0]?[\d.]*[sdifrxq]|%%|\{[^}]*\}|\$\{?\w+\}?|\{%|&&")
TAG = re.compile(r"</?\w[^>]*>|<\w|&(#\d+|\w+);|\[/?\w+\]\(|`")
_ACCELERATOR = re.compile(r"&\w|(?<!\w)_\w|\w_(?=\w*\b)|\\[nrt]")
_TECHNICAL = re.compile(r"https?://|www\.|/\w+/|@|--\w|::|\w=\w|\w\.[a-z]{2,4}\b")
MAX_CHARACTERS = 300  # longer entries are help pages: not one sentence pair
LENGTH_RATIO = 3.0
SURE = 0.9  # lid.176.ftz is small: believed only this far,
LONG_ENOUGH = 40  # and only on this many columns of text


def untranslated(pair: Pair) -> bool:
    return not pair.target or key(pair.source) == key(pair.target)


def fuzzy(pair: Pair) -> bool:
    return pair.fuzzy


def plural(pair: Pair) -> bool:
    """Entries with several forms have no one right answer."""
    return pair.plural


def placeholder(pair: Pair) -> bool:
    return any(PLACEHOLDER.search(text) for text in (pair.source, pair.target))


def tag(pair: Pair) -> bool:
    """Markup: HTML, entities, Markdown links, code."""
    return any(TAG.search(text) for text in (pair.source, pair.target))


def accelerator(pair: Pair) -> bool:
    """Keyboard marks (`&File`), identifiers (`page_id`), escapes."""
    return any(_ACCELERATOR.search(text) for text in (pair.source, pair.target))


def technical(pair: Pair) -> bool:
    """Addresses, paths, options, and strings that are mostly no letters."""
    return any(_TECHNICAL.search(text) or letters(text) < 0.5 * len(text.replace(" ", "")) for text in (pair.source, pair.target))


def length(pair: Pair) -> bool:
    return letters(pair.source) < 2 or max(len(pair.source), len(pair.target)) > MAX_CHARACTERS


def length_ratio(pair: Pair) -> bool:
    """More than three times as wide as the other; short labels (both under 12 columns) may."""
    a, b = columns(pair.source), columns(pair.target)
    return max(a, b) > 12 and max(a, b) > LENGTH_RATIO * min(a, b)


def wrong_language(pair: Pair) -> bool:
    """The target is surely in another language."""
    if columns(pair.target) < LONG_ENOUGH:
        return False
    label, score = identify(pair.target)
    return score >= SURE and not confusable(label, LOCALES[pair.locale].language)


FILTERS = (untranslated, fuzzy, plural, placeholder, tag, accelerator, technical, length, length_ratio, wrong_language)


def clean(pairs: Iterable[Pair]) -> tuple[list[Pair], dict[str, Counter]]:
    """Fit pairs as plain one-line text, in order, and how many each filter removed in each locale ({filter: {locale: n}}).

    Then `duplicate` (same source and target again) and `alternative` (another translation of a source: the first stays).
    """
    kept: dict[tuple[str, str], Pair] = {}
    removed = {name: Counter() for name in (*(f.__name__ for f in FILTERS), "duplicate", "alternative")}
    for pair in pairs:
        pair = replace(pair, source=plain(pair.source), target=plain(pair.target))
        reason = next((f.__name__ for f in FILTERS if f(pair)), None)
        if reason is None and (first := kept.setdefault((pair.locale, key(pair.source)), pair)) is not pair:
            reason = "duplicate" if key(first.target) == key(pair.target) else "alternative"
        if reason:
            removed[reason][pair.locale] += 1
    return list(kept.values()), removed


def letters(text: str) -> int:
    """Letters and the marks that some scripts put on them."""
    if text.isascii():
        return sum(map(str.isalpha, text))
    return sum(unicodedata.category(c)[0] in "LM" for c in text)


def columns(text: str) -> int:
    """Rough length across scripts: an ideograph, kana or hangul syllable says as much as 2.5 letters."""
    if text.isascii():
        return len(text)
    return round(sum(2.5 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
