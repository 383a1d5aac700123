"""`date`: a date in the target locale's written form, in its calendar order in figures, or in ISO 8601."""

import datetime
import random
import re
from dataclasses import replace
from datetime import date as Date

from babel import dates

from megatron_tower.data.pair import plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, cldr, contains, is_text, one_of, swapped

FORMS = ("long", "numeric", "iso")


def rendered(day: Date, form: str, code: str) -> str:
    if form == "iso":
        return day.isoformat()
    return plain(dates.format_date(day, _pattern(code) if form == "numeric" else "long", locale=cldr(code)))


def _pattern(code: str) -> str:
    """CLDR's short pattern with all digits of the year, e.g. dd.MM.y."""
    return re.sub("y+", "y", dates.get_date_format("short", locale=cldr(code)).pattern)


def is_date(value: object) -> bool:
    """YYYY-MM-DD, and a day that exists."""
    try:
        return is_text(value) and Date.fromisoformat(value).isoformat() == value
    except ValueError:  # fromisoformat's way of saying no
        return False


def propose(draft: Draft, rng: random.Random) -> Proposal:
    form = rng.choice(FORMS)
    if draft.kind == "date":
        day = _read(draft.english)
        reference = draft.reference if form == "long" else rendered(day, form, draft.target_locale)
        return replace(draft, reference=reference), {"form": form, "date": day.isoformat()}
    if draft.is_value:
        return None
    day = Date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 85))
    changed = draft.appended(rendered(day, "long", draft.source_locale), rendered(day, form, draft.target_locale))
    return changed, {"form": form, "date": day.isoformat()}


def _read(english: str) -> Date:
    """`March 12, 2024`, with or without the day of the week."""
    month_and_day = english.split(", ", 1)[1] if english.count(",") == 2 else english
    return datetime.datetime.strptime(month_and_day, "%B %d, %Y").date()


def check(constraint: dict, answer: str, case: dict) -> bool:
    """In figures, leading zeros and spaces are free; order and separators are the locale's."""
    day, code = Date.fromisoformat(constraint["date"]), case["target_locale"]
    if constraint["form"] != "numeric":
        return contains(answer, rendered(day, constraint["form"], code))
    figures = {"d": f"0?{day.day}", "M": f"0?{day.month}", "y": str(day.year)}
    parts = re.findall(r"d+|M+|y|[^dMy]+", _pattern(code))
    spelt = "".join(figures.get(part[0]) or r"\s?".join(map(re.escape, part.strip())) + r"\s?" for part in parts)
    return re.search(rf"(?<!\d){spelt}(?!\d)", plain(answer)) is not None


def damage(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    day, code, form = Date.fromisoformat(constraint["date"]), case["target_locale"], constraint["form"]
    right = rendered(day, form, code)
    other = rendered(day, "iso" if form == "long" else "long", code)
    return {
        "other_date": swapped(answer, right, rendered(day + datetime.timedelta(days=400), form, code)),
        "other_date_form": swapped(answer, right, other),
    }


FAMILY = Family("date", propose, check, damage, needs={"form": one_of(FORMS), "date": is_date})
