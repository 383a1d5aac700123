"""Translation tasks with one right answer, generated from CLDR through Babel: dates, money, units, names and their like.

    generate("de_DE", ["date", "money"], count=1000, seed=7)  ->  "March 12, 2024" = "12. März 2024", ...

Names come from finite lists, the other kinds are drawn. What would not be one-to-one is left out: four-digit integers (Spanish,
Polish and Portuguese don't group them, Babel does), units that Babel has no long pattern for, Korean clock times (it prints "PM").
"""

import datetime
import random
from collections.abc import Callable, Iterator
from functools import lru_cache

from babel import Locale as Cldr
from babel import dates, numbers, units

from megatron_tower.config import InputError
from megatron_tower.data.locales import locale
from megatron_tower.data.pair import Pair, key, plain

_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF")
_UNITS = (
    *("length-kilometer", "length-meter", "length-centimeter", "mass-kilogram", "mass-gram", "volume-liter"),
    *("duration-hour", "duration-minute", "duration-second", "duration-day", "duration-week", "duration-month", "duration-year"),
)
_SPANS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2592000, "year": 31536000}  # Babel's own, in s


def _names(table: str) -> Callable[[str, random.Random], Iterator[tuple[str, str]]]:
    """Territories, languages or currencies that both sides name, in random order."""

    def draw(cldr: str, rng: random.Random) -> Iterator[tuple[str, str]]:
        english, other = getattr(_cldr("en"), table), getattr(_cldr(cldr), table)
        codes = sorted(code for code in english if code in other and not (table == "territories" and code.isdigit()))
        yield from ((english[code], other[code]) for code in rng.sample(codes, len(codes)))

    return draw


def _date(cldr: str, rng: random.Random) -> Callable[[str], str]:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 85))
    style = rng.choice(("long", "long", "full"))
    return lambda to: dates.format_date(day, style, locale=to)


def _time(cldr: str, rng: random.Random) -> Callable[[str], str] | None:
    moment = datetime.time(rng.randrange(24), rng.randrange(60))
    return None if cldr == "ko_KR" else lambda to: dates.format_time(moment, "short", locale=to)


def _number(cldr: str, rng: random.Random) -> Callable[[str], str]:
    value = _amount(rng)
    return lambda to: numbers.format_decimal(value, locale=to)


def _money(cldr: str, rng: random.Random) -> Callable[[str], str]:
    value, currency, form = _amount(rng), rng.choice(_CURRENCIES), rng.choice(("standard", "name"))
    return lambda to: numbers.format_currency(value, currency, locale=to, format_type=form)


def _unit(cldr: str, rng: random.Random) -> Callable[[str], str] | None:
    value, unit = rng.choice((rng.randrange(2, 1000), rng.randrange(11, 1000) / 10)), rng.choice(_UNITS)
    unserved = unit in units.format_unit(value, unit, length="long", locale=cldr)  # "26,1 duration-year"
    return None if unserved else lambda to: units.format_unit(value, unit, length="long", locale=to)


def _relative_time(cldr: str, rng: random.Random) -> Callable[[str], str]:
    span, count, sign = rng.choice(list(_SPANS)), rng.randrange(1, 100), rng.choice((-1, 1))
    moved = datetime.timedelta(seconds=sign * count * _SPANS[span])
    return lambda to: dates.format_timedelta(moved, granularity=span, threshold=1e9, add_direction=True, locale=to)


def _amount(rng: random.Random) -> float:
    """Two decimals below 1,000, none from 10,000 on."""
    return rng.choice((rng.randrange(101, 100000) / 100, rng.randrange(10000, 1000000)))


_NAMES = {"territory": _names("territories"), "language": _names("languages"), "currency": _names("currencies")}
_DRAWN = {"date": _date, "time": _time, "number": _number, "money": _money, "unit": _unit, "relative_time": _relative_time}
KINDS = (*_NAMES, *_DRAWN)


def generate(code: str, kinds: list[str], count: int, seed: int) -> list[Pair]:
    """About `count` distinct pairs of a locale, the same for the same seed, kind after kind; no target equals its source.

    Finite kinds (names) give at most an equal share, the drawn ones divide the rest. Raises InputError for an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"data.cldr_kinds={unknown[0]} is unknown: use some of {', '.join(KINDS)}")
    found: dict[str, Pair] = {}
    ordered = sorted(kinds, key=KINDS.index)
    for position, kind in enumerate(ordered):
        enough = len(found) + (count - len(found)) // (len(ordered) - position)
        for pair in _of_kind(code, kind, enough - len(found), random.Random(f"{seed}/{code}/{kind}")):
            if len(found) < enough and key(pair.source) != key(pair.target):
                found.setdefault(key(pair.source), pair)
    return list(found.values())


def _of_kind(code: str, kind: str, count: int, rng: random.Random) -> Iterator[Pair]:
    """More candidates than `count`, since some repeat one another or their source."""
    cldr = locale(code).cldr
    candidates = _NAMES[kind](cldr, rng) if kind in _NAMES else _renderings(_DRAWN[kind], cldr, 4 * count, rng)
    for source, target in candidates:
        yield Pair(code, plain(source), plain(target), f"cldr/{kind}", kind)


def _renderings(draw: Callable, cldr: str, tries: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(tries):
        if render := draw(cldr, rng):
            yield render("en"), render(cldr)


@lru_cache(maxsize=64)
def _cldr(name: str) -> Cldr:
    return Cldr.parse(name)
