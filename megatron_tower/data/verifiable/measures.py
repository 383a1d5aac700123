"""`unit`: a measure written out, with its symbol, or converted from imperial to metric within a tolerance."""

import random
import re
from dataclasses import replace
from functools import lru_cache

from babel import numbers, units

from megatron_tower.data.pair import key, plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, cldr, has_case, is_number, one_of, swapped
from megatron_tower.data.verifiable.numbers import read

FORMS = ("name", "symbol", "converted")
SYMBOLS = {
    **{"length-kilometer": "km", "length-meter": "m", "length-centimeter": "cm"},
    **{"mass-kilogram": "kg", "mass-gram": "g", "volume-liter": "l"},
}
METRIC = {  # to, factor (exact by definition, the US gallon)
    "length-mile": ("length-kilometer", 1.609344),
    "length-foot": ("length-meter", 0.3048),
    "length-inch": ("length-centimeter", 2.54),
    "mass-pound": ("mass-kilogram", 0.45359237),
    "mass-ounce": ("mass-gram", 28.349523125),
    "volume-gallon": ("volume-liter", 3.785411784),
}
TOLERANCE = 0.02  # of a conversion; 19, 19.3 and 19.31 km are all 12 miles


def written(value: float, unit: str, form: str, code: str) -> str | None:
    """None for a unit that Babel has no pattern for in this locale (Chinese: hardly any); symbols fall back to the SI's."""
    text = units.format_unit(value, unit, length="long" if form == "name" else "short", locale=cldr(code))
    if unit not in text:
        return plain(text)
    return None if form == "name" else f"{plain(numbers.format_decimal(value, locale=cldr(code)))} {SYMBOLS[unit]}"


@lru_cache(maxsize=1024)
def _names(unit: str, form: str, code: str) -> tuple[str, ...]:
    """What the unit is called beside any number, longest first."""
    forms = ("name", "symbol") if form == "converted" else (form,)
    texts = [written(value, unit, each, code) for each in forms for value in (1, 2, 3, 5, 11, 1.5, 0.5)]
    names = {key(re.sub(r"^[\d.,\s]+", "", text)) for text in texts if text}
    return tuple(sorted(names | ({SYMBOLS[unit]} if form != "name" else set()), key=lambda name: (-len(name), name)))


def propose(draft: Draft, rng: random.Random) -> Proposal:
    if draft.kind == "unit":
        unit = _unit(draft.english)
        return _kept(draft, read(draft.english), unit, rng) if unit else None
    if draft.is_value:
        return None
    if rng.random() < 0.5:
        unit = rng.choice(list(SYMBOLS))
        value = rng.choice((rng.randrange(2, 1000), rng.randrange(11, 1000) / 10))
        return _kept(draft, value, unit, rng)
    imperial, value = rng.choice(list(METRIC)), rng.randrange(2, 36)
    metric, factor = METRIC[imperial]
    shown = written(value, imperial, "name", draft.source_locale)
    result = round(value * factor, 1)
    right = written(result, metric, rng.choice(("name", "symbol")), draft.target_locale)
    if shown is None or right is None:
        return None
    return draft.appended(shown, right), {"form": "converted", "value": result, "unit": metric, "symbol": SYMBOLS[metric]}


def _kept(draft: Draft, value: float, unit: str, rng: random.Random) -> Proposal:
    form = rng.choice(("name", "symbol"))
    shown, right = written(value, unit, "name", draft.source_locale), written(value, unit, form, draft.target_locale)
    if shown is None or right is None:
        return None
    changed = replace(draft, reference=right) if draft.kind == "unit" else draft.appended(shown, right)
    return changed, {"form": form, "value": value, "unit": unit, "symbol": SYMBOLS[unit]}


def _unit(english: str) -> str | None:
    name = english.split(" ", 1)[1].rstrip("s")
    return next((unit for unit in SYMBOLS if unit.split("-")[1] == name), None)


def check(constraint: dict, answer: str, case: dict) -> bool:
    """Some number in the locale's form before one of the unit's names is the value, within the tolerance when converted."""
    code, form, value = case["target_locale"], constraint["form"], constraint["value"]
    allowed = TOLERANCE * value if form == "converted" else 1e-9
    names = "|".join(re.escape(name) + (r"(?!\w)" if has_case(name[-1]) else "") for name in _names(constraint["unit"], form, code))
    decimal = re.escape(numbers.get_decimal_symbol(cldr(code)))
    figures = re.findall(rf"(?<!\d)(?<!\d[.,])(\d+(?:{decimal}\d+)?)[\s-]?(?:{names})", key(answer))
    return any(abs(float(figure.replace(",", ".")) - value) <= allowed for figure in figures)


def damage(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    """A wrong amount, another unit, and a number without any; in the words the answer has."""
    code, unit = case["target_locale"], constraint["unit"]
    options = (written(constraint["value"], unit, form, code) for form in ("name", "symbol"))
    right = next(text for text in options if text and key(text) in key(answer))
    figure, twice = (plain(numbers.format_decimal(value, locale=cldr(code))) for value in (constraint["value"], 2 * constraint["value"]))
    return {
        "other_measure": swapped(answer, right, right.replace(figure, twice)),
        "imperial": swapped(answer, right, f"{figure} miles"),
        "no_unit": swapped(answer, right, figure),
    }


FAMILY = Family("unit", propose, check, damage, needs={"form": one_of(FORMS), "value": is_number, "unit": one_of(SYMBOLS)})
