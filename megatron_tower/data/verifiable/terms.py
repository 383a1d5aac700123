"""`glossary`, `keep` and `placeholder`: words that must appear, names that stay as they are, marks for programs."""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache

from babel import Locale

from megatron_tower.data.locales import locale
from megatron_tower.data.pair import key, plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, cldr, has_case, is_text, is_texts, swapped

# Invented, so that no model knows a translation; in every script's neighbourhood they stay Latin.
_NAMES = ("BlueHarbor", "Nordlicht", "Kestrel", "Mira Cloud", "OpenLedger", "Tamarind", "Vela One", "Quillmark", "Sunbird", "Atlas Pro")
_INSERTED = ("{name}", "{count}", "{0}", "%(user)s", "%(total)d", "%s", "%d", "&nbsp;", "$HOME", "https://example.org/help", "[[page]]")
_TAGS = ("b", "i", "em", "strong", "code", "u")


def _word(term: str) -> re.Pattern:
    """The term with nothing glued to its front; endings are grammar. Chinese and Japanese have no such border."""
    return re.compile((r"(?<![^\W\d_])" if has_case(term[0]) else "") + re.escape(key(term)))


def _propose_glossary(draft: Draft, rng: random.Random) -> Proposal:
    """A shorter pair found inside this one, else a name of a place or language that is added."""
    if draft.terms:
        source_term, term = rng.choice(draft.terms)
        return draft, {"source_term": source_term, "term": term}
    if draft.is_value:
        return None
    source_term, term = rng.choice(_added(draft.source_locale, draft.target_locale))
    return draft.appended(source_term, term), {"source_term": source_term, "term": term}


@lru_cache(maxsize=64)
def _added(source: str, target: str) -> list[tuple[str, str]]:
    """Territories and languages that the two locales call differently."""
    both = []
    for table in ("territories", "languages"):
        mine, theirs = (getattr(Locale.parse(cldr(code)), table) for code in (source, target))
        both += [(plain(mine[c]), plain(theirs[c])) for c in sorted(mine) if c in theirs and not c.isdigit()]
    return [(a, b) for a, b in both if key(a) != key(b) and key(a) not in key(b) and key(b) not in key(a)]


def _check_glossary(constraint: dict, answer: str, case: dict) -> bool:
    return _word(constraint["term"]).search(key(answer)) is not None


def _damage_glossary(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    return {
        "term_untranslated": _all_swapped(answer, constraint["term"], constraint["source_term"]),
        "term_missing": _all_swapped(answer, constraint["term"], "…"),
        "other_term": _all_swapped(answer, constraint["term"], constraint["term"][::-1] + "x"),
    }


def _all_swapped(text: str, old: str, new: str) -> str:
    return re.sub(re.escape(plain(old)), lambda _: new, plain(text), flags=re.IGNORECASE)


def _propose_keep(draft: Draft, rng: random.Random) -> Proposal:
    name = rng.choice(_NAMES)
    form = rng.choice(("{0}: {1}", "{1} ({0})", "{1} – {0}"))
    changed = replace(draft, source=form.format(name, draft.source), reference=form.format(name, draft.reference))
    return changed, {"terms": [name]}


def _check_keep(constraint: dict, answer: str, case: dict) -> bool:
    """Letter by letter, capitals too."""
    return all(term in plain(answer) for term in constraint["terms"])


def _damage_keep(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    name = constraint["terms"][0]
    return {
        "name_translated": answer.replace(name, locale(case["target_locale"]).translation),
        "name_missing": answer.replace(name, ""),
        "name_lowered": answer.replace(name, name.lower()),
    }


def _propose_placeholder(draft: Draft, rng: random.Random) -> Proposal:
    if rng.random() < 0.4:
        tag = rng.choice(_TAGS)
        form, marks = f"<{tag}>{{}}</{tag}>", [f"<{tag}>", f"</{tag}>"]
    else:
        mark = rng.choice(_INSERTED)
        form, marks = rng.choice((f"{_escaped(mark)}: {{}}", f"{{}} {_escaped(mark)}", f"{{}} ({_escaped(mark)})")), [mark]
    return replace(draft, source=form.format(draft.source), reference=form.format(draft.reference)), {"marks": marks}


def _escaped(mark: str) -> str:
    return mark.replace("{", "{{").replace("}", "}}")


def _check_placeholder(constraint: dict, answer: str, case: dict) -> bool:
    """Each mark exactly as often as asked, tags in their order."""
    wanted = Counter(constraint["marks"])
    places = [answer.find(mark) for mark in dict.fromkeys(constraint["marks"])]
    return all(answer.count(mark) == count for mark, count in wanted.items()) and (len(wanted) < 2 or places == sorted(places))


def _damage_placeholder(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    mark = constraint["marks"][0]
    inside = re.sub(r"\w", "x", mark, count=1)
    return {
        "mark_missing": answer.replace(mark, ""),
        "mark_changed": answer.replace(mark, inside if inside != mark else f"{mark[0]} {mark[1:]}"),
        "mark_doubled": swapped(answer, mark, f"{mark}{mark}"),
    }


_CASED = frozenset({"casing"})
GLOSSARY = Family(
    "glossary", _propose_glossary, _check_glossary, _damage_glossary, needs={"source_term": is_text, "term": is_text}, excludes=_CASED
)
KEEP = Family("keep", _propose_keep, _check_keep, _damage_keep, needs={"terms": is_texts}, excludes=_CASED)
PLACEHOLDER = Family(
    "placeholder", _propose_placeholder, _check_placeholder, _damage_placeholder, needs={"marks": is_texts}, excludes=_CASED
)
