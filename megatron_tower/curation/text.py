"""A text as filters look at it: words, lines, paragraphs and n-grams, each computed once however many filters ask.

Where no spaces divide words (Chinese, Japanese, Thai) a character stands for one; Text.spaced says which. A Chinese or Japanese word
is about two characters long, so that `size` and the lengths of n-grams are counted in twos there.
Leaves out: real word segmentation.
"""

import re
from functools import cached_property, lru_cache
from itertools import chain, compress

from megatron_tower.data import cleaning
from megatron_tower.data.locales import Locale, locale

PER_WORD = 2  # characters, where no spaces divide words
SAMPLED = 100  # characters at each of three places
_PARAGRAPH = re.compile(r"\n\s*\n")
_LETTER = re.compile(r"[^\W\d_]")
_HAN = "\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CYRILLIC = "\u0400-\u052f"
_DEVANAGARI = "\u0900-\u097f"
_ARABIC = "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff"
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u024f\u0300-\u036f\u1e00-\u1eff"
_SCRIPTS = {
    **{"zh": _HAN, "ja": _HAN + "\u3040-\u30ff\uff66-\uff9f", "ko": "\uac00-\ud7af\u1100-\u11ff\u3130-\u318f"},
    **dict.fromkeys(("ru", "uk", "bg", "sr"), _CYRILLIC),
    **dict.fromkeys(("hi", "mr"), _DEVANAGARI),
    **dict.fromkeys(("ar", "fa", "ur"), _ARABIC),
    **{"el": "\u0370-\u03ff\u1f00-\u1fff", "he": "\u0590-\u05ff", "th": "\u0e00-\u0e7f", "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f"},
    **{"gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff", "ml": "\u0d00-\u0d7f"},
}


@lru_cache(maxsize=2)  # both sides of the row that filters look at now
def view(text: str, code: str) -> "Text":
    """The view of a text in the locale `code`; raises InputError for a locale that is unknown."""
    return Text(text, locale(code))


class Text:
    def __init__(self, text: str, of: Locale) -> None:
        self.text, self.locale, self.spaced, self.language = text, of, of.spaced, of.language
        self._found: dict[int, list[list[int]]] = {}

    @cached_property
    def words(self) -> list[str]:
        words = self.text.split()
        return words if self.spaced else list("".join(words))

    @cached_property
    def size(self) -> float:
        """In words, or what would be words."""
        return len(self.words) / (1 if self.spaced else PER_WORD)

    @cached_property
    def characters(self) -> int:
        return sum(map(len, self.words))

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, _PARAGRAPH.split(self.text)) if part]

    @cached_property
    def columns(self) -> int:
        return cleaning.columns(self.text)

    @cached_property
    def letters(self) -> int:
        return cleaning.letters(self.text)

    @cached_property
    def script(self) -> float:
        """Share of the letters that are of the language's script; 1 where there are no letters."""
        others = _letters_of(self.language).sub("", self.text)
        own, foreign = len(self.text) - len(others), len(_LETTER.findall(others))
        return own / (own + foreign) if own + foreign else 1.0

    @cached_property
    def sample(self) -> "Text":
        """The beginning, the middle and the end of a long text: what tells its language."""
        text, middle = self.text, (len(self.text) - SAMPLED) // 2
        if len(text) <= 3 * SAMPLED:
            return self
        return Text(" ".join((text[:SAMPLED], text[middle : middle + SAMPLED], text[-SAMPLED:])), self.locale)

    def top(self, n: int) -> float:
        """Share of characters that the most frequent n words make up, if they are there twice."""
        if not (groups := self._again(n)):
            return 0.0
        most = max(groups, key=len)
        return len(most) * sum(map(len, self.words[most[0] : most[0] + n])) / self.characters

    def duplicated(self, n: int) -> float:
        """Share of characters within n words that are there more than once; overlaps are counted once."""
        if not (groups := self._again(n)):
            return 0.0
        within, ones = bytearray(len(self.words)), b"\1" * n
        for start in chain.from_iterable(groups):
            within[start : start + n] = ones
        return sum(map(len, compress(self.words, within))) / self.characters

    def _again(self, n: int) -> list[list[int]]:
        """For any n words that are there more than once, where they begin: only what n - 1 words share, n words can."""
        if n not in self._found:
            words, end, found = self.words, len(self.words) - n, []
            for group in self._again(n - 1) if n > 1 else [range(len(words))]:
                by_last: dict[str, list[int]] = {}
                for start in group:
                    if start <= end:
                        by_last.setdefault(words[start + n - 1], []).append(start)
                found += [starts for starts in by_last.values() if len(starts) > 1]
            self._found[n] = found
        return self._found[n]


@lru_cache
def _letters_of(language: str) -> re.Pattern:
    return re.compile(f"[{_SCRIPTS.get(language, _LATIN)}]+")
