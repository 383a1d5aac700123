"""`Pair`: an English string and its translation, from a catalogue or from CLDR; and the two normal forms of text."""

import re
import unicodedata
from dataclasses import dataclass

INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff\u00ad"))
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Pair:
    """English `source`, its `target` in `locale`; pairs of one `origin` follow one another there.

    kind: `catalogue`, or what CLDR task it is (date, money, ...). fuzzy, plural: as the catalogue flags them.
    """

    locale: str
    source: str
    target: str
    origin: str
    kind: str = "catalogue"
    fuzzy: bool = False
    plural: bool = False


def plain(text: str) -> str:
    """One line of NFC text: no-break and narrow spaces are spaces, runs of whitespace are one, nothing invisible."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text).translate(INVISIBLE)).strip()


def key(text: str) -> str:
    """What makes two strings the same for the split and for duplicates: case, width and spacing don't count."""
    return plain(unicodedata.normalize("NFKC", text)).casefold()
