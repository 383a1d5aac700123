"""`casing`, `quotes`, `script` and `length`: how the translation is written, whatever it says."""

import random
import re
import unicodedata
from dataclasses import replace

from megatron_tower.data.locales import locale
from megatron_tower.data.pair import key, plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, has_case, is_number, one_of

_CASES = {"upper": str.upper, "lower": str.lower}
UNCASED = ("hi", "zh", "ja", "ko")  # languages whose script has no capitals
SCRIPTS = {"ru": "Cyrillic", "uk": "Cyrillic", "hi": "Devanagari", "zh": "Han", "ja": "Kana", "ko": "Hangul"}  # the rest: Latin
_BLOCKS = {  # how Unicode names begin that belong to the script
    "Latin": ("LATIN",),
    "Cyrillic": ("CYRILLIC",),
    "Devanagari": ("DEVANAGARI",),
    "Han": ("CJK",),
    "Kana": ("HIRAGANA", "KATAKANA", "CJK"),
    "Hangul": ("HANGUL",),
}
# CLDR's delimiters, which Babel leaves out; first what the reference has, then what is accepted too.
_QUOTES = {
    "en": "“”", "de_DE": "„“ »«", "nl_NL": "‘’ “”", "is_IS": "„“", "es_ES": "«» “”", "es_MX": "“” «»", "fr_FR": "«»", "fr_CA": "«»",
    "pt_PT": "«» “”", "pt_BR": "“”", "uk_UA": "«» „“", "hi_IN": "“”", "zh_CN": "“”", "zh_TW": "「」", "ru_RU": "«»", "cs_CZ": "„“ »«",
    "ko_KR": "“” ‘’", "ja_JP": "「」", "it_IT": "«» “”", "da_DK": "“” »« „“", "pl_PL": "„” «»", "hu_HU": "„” »«", "sv_SE": "””",
    "no_NO": "«»", "nn_NO": "«»", "ro_RO": "„” «»", "fi_FI": "””",
}  # fmt: skip
_MARKS = "\"'“”„‘’‚«»「」『』‹›"


def _titled(text: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))


def _propose_casing(draft: Draft, rng: random.Random) -> Proposal:
    if locale(draft.target_locale).language in UNCASED:
        return None
    form = rng.choice(("upper", "lower", "title"))
    text = (_CASES.get(form) or _titled)(draft.reference)
    return None if text == draft.reference else (replace(draft, reference=text), {"form": form})


def _check_casing(constraint: dict, answer: str, case: dict) -> bool:
    """Upper and lower: no letter of the other case. Title: no word begins with a small letter."""
    if not any(c.isupper() or c.islower() for c in answer):
        return False
    if constraint["form"] == "title":
        return not any(word[0].islower() for word in plain(answer).split(" ") if word)
    return answer == _CASES[constraint["form"]](answer)


def _damage_casing(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    variants = {"lowered": answer.lower(), "raised": answer.upper(), "swapped_case": answer.swapcase(), "one_small": _one_small(answer)}
    return {name: text for name, text in variants.items() if not _check_casing(constraint, text, case)}


def _one_small(text: str) -> str:
    """Its first letter in the other case."""
    at = next(i for i, c in enumerate(text) if has_case(c))
    return text[:at] + text[at].swapcase() + text[at + 1 :]


def _propose_quotes(draft: Draft, rng: random.Random) -> Proposal:
    if any(c in _MARKS for c in draft.source + draft.reference):
        return None
    return replace(draft, source=_quoted(draft.source, draft.source_locale), reference=_quoted(draft.reference, draft.target_locale)), {}


def _quoted(text: str, code: str) -> str:
    """French sets its marks off by a space."""
    opening, closing = _QUOTES[code][:2]
    return f"{opening} {text} {closing}" if code.startswith("fr") else f"{opening}{text}{closing}"


def _check_quotes(constraint: dict, answer: str, case: dict) -> bool:
    """Exactly one pair of marks that the locale knows; an apostrophe inside a word is none."""
    found = re.sub(r"(?<=\w)['’](?=\w)", "", answer)
    marks = "".join(c for c in found if c in _MARKS)
    return marks in _QUOTES[case["target_locale"]].split(" ")


def _damage_quotes(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    bare = answer.translate(dict.fromkeys(map(ord, _MARKS))).strip()
    return {"no_quotes": bare, "straight_quotes": f'"{bare}"', "foreign_quotes": f"‹{bare}›"}


def script(code: str) -> str:
    return SCRIPTS.get(locale(code).language, "Latin")


def share_in_script(text: str, name: str) -> float | None:
    """Share of its letters that belong to the script; None without letters."""
    letters = [c for c in text if unicodedata.category(c)[0] == "L"]
    return sum(unicodedata.name(c, "").startswith(_BLOCKS[name]) for c in letters) / len(letters) if letters else None


def _propose_script(draft: Draft, rng: random.Random) -> Proposal:
    """Where the right answer has no foreign letter."""
    name = script(draft.target_locale)
    return (draft, {"script": name}) if share_in_script(draft.reference, name) == 1 else None


def _check_script(constraint: dict, answer: str, case: dict) -> bool:
    return share_in_script(answer, constraint["script"]) == 1


def _damage_script(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    alien = "translation" if constraint["script"] != "Latin" else "перевод"
    return {
        "foreign_word": f"{answer} {alien}",
        "transcribed": " ".join(alien for _ in answer.split(" ")),
        "foreign_start": f"{alien} {answer}",
    }


def _propose_length(draft: Draft, rng: random.Random) -> Proposal:
    """A limit at or up to a fifth above what the reference takes."""
    words = locale(draft.target_locale).spaced and _size(draft.reference, "words") > 1
    form = rng.choice(("characters", "words") if words else ("characters",))
    return draft, {"form": form, "limit": int(_size(draft.reference, form) * (1 + rng.choice((0, 0.1, 0.2))))}


def _size(text: str, form: str) -> int:
    return len(plain(text)) if form == "characters" else len(text.split())


def _check_length(constraint: dict, answer: str, case: dict) -> bool:
    return 0 < _size(answer, constraint["form"]) <= constraint["limit"]


def _damage_length(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    filler = key(locale(case["target_locale"]).translation)
    padded = answer
    while _check_length(constraint, padded, case):
        padded += f" {filler}"
    return {"too_long": padded, "far_too_long": f"{padded} {padded}"}


CASING = Family("casing", _propose_casing, _check_casing, _damage_casing, needs={"form": one_of(("upper", "lower", "title"))})
QUOTES = Family("quotes", _propose_quotes, _check_quotes, _damage_quotes)
SCRIPT = Family("script", _propose_script, _check_script, _damage_script, needs={"script": one_of(_BLOCKS)})
LENGTH = Family(
    "length", _propose_length, _check_length, _damage_length, needs={"form": one_of(("characters", "words")), "limit": is_number}
)
