"""What makes a document unfit for training, one factory each: options -> drop(row) -> bool.

Options are thresholds; conf/data/curation/filters.yaml names them all, and `per_locale` there changes any for a language.
Sources: Gopher (arXiv 2112.11446, table A1 and appendix A.1.1), C4 (arXiv 1910.10683, section 2.2), FineWeb2 (arXiv 2506.20920:
thresholds differ by language). Their rules that know English words (stop words, terminal punctuation) are left out.
Leaves out: duplicates and what models say of a text (scores.py).
"""

import re
from collections.abc import Callable
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.curation.shards import Row
from megatron_tower.curation.text import PER_WORD, Text, view
from megatron_tower.data.language import confusable, identify

Drop = Callable[[Row], bool]
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # Gopher, table A1: n -> share of characters
DUPLICATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # the same
_LETTER = re.compile(r"[^\W\d_]")
_HTML = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|&(?:#\d+|[a-zA-Z]+);")
_BULLETS = tuple("•‣◦▪●○■□–—*-·・")
_ELLIPSES = ("...", "…")
_SERVICE = ("javascript", "cookie", "gdpr", "adblock", "captcha", "©")
_BROKEN = re.compile("\ufffd|[\xc2\xc3][\x80-\xbf]|\xe2\u20ac")  # what could not be decoded, or was decoded twice


def _text(row: Row) -> Text:
    return view(row["text"], row["locale"])


def length(shortest: int = 50, longest: int = 100000) -> Drop:
    """Words, or half the characters where no spaces divide words. Defaults: Gopher."""
    return lambda row: not shortest <= _text(row).size <= longest


def language(sure: float = 0.5, long_enough: int = 40, least_script: float = 0.5) -> Drop:
    """Most letters are of another script; or the text has `long_enough` columns and is in another language, with `sure` probability."""

    def drop(row: Row) -> bool:
        seen = _text(row).sample
        if seen.script < least_script:
            return True
        if seen.columns < long_enough:
            return False
        label, score = identify(seen.text, longest=len(seen.text))
        return score >= sure and not confusable(label, seen.language)

    return drop


def repetition(lines: float = 0.30, line_characters: float = 0.20, grams: float = 1.0) -> Drop:
    """Shares of lines and paragraphs that are there again, of characters in them, and of characters in repeated n-grams.

    grams: what the thresholds of Gopher's table A1 are multiplied by.
    """

    def drop(row: Row) -> bool:
        text = _text(row)
        for parts in (text.lines, text.paragraphs):
            if again := len(parts) - len(unique := set(parts)):
                whole = sum(map(len, parts))
                if again / len(parts) > lines or (whole - sum(map(len, unique))) / whole > line_characters:
                    return True
        per = 1 if text.spaced else PER_WORD
        if any(text.top(n * per) > most * grams for n, most in TOP.items()):
            return True
        for n, most in DUPLICATED.items():
            if not (share := text.duplicated(n * per)):
                return False  # nor are longer ones
            if share > most * grams:
                return True
        return False

    return drop


def quality(
    shortest_word: float = 3.0,
    longest_word: float = 10.0,
    alphabetic: float = 0.8,
    symbols: float = 0.1,
    bullets: float = 0.9,
    ellipses: float = 0.3,
) -> Drop:
    """Gopher's rules: mean length of words, share of words with a letter, # and ellipses a word, lines that are list items or break off.

    Where no spaces divide words there is no mean length, and `alphabetic` is the share of characters that are letters.
    """

    def drop(row: Row) -> bool:
        text = _text(row)
        words, whole = len(text.words), text.text
        if not words:
            return True
        if text.spaced and not shortest_word <= text.characters / words <= longest_word:
            return True
        without = sum(not _LETTER.search(word) for word in text.words if not word.isalpha())
        if 1 - without / words < alphabetic:
            return True
        if max(whole.count("#"), sum(map(whole.count, _ELLIPSES))) > symbols * text.size:
            return True
        most = len(text.lines)
        return (
            sum(line.startswith(_BULLETS) for line in text.lines) > bullets * most
            or sum(line.endswith(_ELLIPSES) for line in text.lines) > ellipses * most
        )

    return drop


def boilerplate(lines: float = 0.2) -> Drop:
    """Placeholder text, or more than this share of lines about cookies, scripts and rights. After C4."""

    def drop(row: Row) -> bool:
        text = row["text"].lower()
        if "lorem ipsum" in text:
            return True
        if not any(word in text for word in _SERVICE):
            return False
        about = sum(any(word in line for word in _SERVICE) for line in text.split("\n"))
        return about > lines * len(_text(row).lines)

    return drop


def markup(tags: float = 0.05, braces: float = 0.05, broken: float = 0.01) -> Drop:
    """HTML that was not taken out, program code, or broken encoding: how many a word are too many."""

    def drop(row: Row) -> bool:
        text = _text(row)
        whole, size = text.text, text.size
        return (
            whole.count("{") + whole.count("}") > braces * size
            or len(_BROKEN.findall(whole)) > broken * size
            or sum(1 for _ in _HTML.finditer(whole)) > tags * size
        )

    return drop


def blocked(file: str, most: int = 0) -> Drop:
    """More than `most` words of a list, one a line, in any case. Raises InputError for a list that is not there or is empty."""
    try:
        words = {line.strip().casefold() for line in Path(file).read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as a list of words ({error}): one word a line, UTF-8") from error
    if not words:
        raise InputError(f"{file} holds no words: one word a line, or take the filter out")
    any_of = "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))
    within, whole = re.compile(any_of), re.compile(rf"(?<!\w)(?:{any_of})(?!\w)")

    def drop(row: Row) -> bool:
        pattern = whole if _text(row).spaced else within
        return sum(1 for _ in pattern.finditer(row["text"].casefold())) > most

    return drop


FILTERS: dict[str, Callable[..., Drop]] = {
    one.__name__: one for one in (length, language, boilerplate, markup, quality, repetition, blocked)
}
