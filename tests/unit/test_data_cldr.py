"""CLDR tasks against answers written by hand, in every locale of the recipe."""

import datetime
import random

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import cldr
from megatron_tower.data.locales import LOCALES, find, locale

# What a person of the place writes.
BY_HAND = {
    "de_DE": {"March 12, 2024": "12. März 2024", "Germany": "Deutschland", "in 3 days": "in 3 Tagen", "12.5 kilometers": "12,5 Kilometer"},
    "es_ES": {"March 12, 2024": "12 de marzo de 2024", "in 3 days": "dentro de 3 días", "10,500 euros": "10.500 euros", "3:45 PM": "15:45"},
    "fr_FR": {"Tuesday, March 12, 2024": "mardi 12 mars 2024", "2 months ago": "il y a 2 mois", "234,567": "234 567"},
    "pt_BR": {"March 12, 2024": "12 de março de 2024", "2 months ago": "há 2 meses", "Germany": "Alemanha"},
    "ja_JP": {"March 12, 2024": "2024年3月12日", "in 3 days": "3 日後", "Germany": "ドイツ"},
    "zh_CN": {"March 12, 2024": "2024年3月12日", "in 3 days": "3天后", "Germany": "德国"},
    "ru_RU": {"in 3 days": "через 3 дня", "2 months ago": "2 месяца назад", "Germany": "Германия"},
    "fi_FI": {"March 12, 2024": "12. maaliskuuta 2024", "12.5 kilometers": "12,5 kilometriä"},
    "hu_HU": {"March 12, 2024": "2024. március 12."},
    "ko_KR": {"March 12, 2024": "2024년 3월 12일", "in 3 days": "3일 후"},
    "hi_IN": {"March 12, 2024": "12 मार्च 2024"},
    "is_IS": {"Germany": "Þýskaland"},
}


class Dealt(random.Random):
    """Deals the given values in turn: `randrange` and `choice` answer what the test wants."""

    def __init__(self, *values: object) -> None:
        super().__init__(0)
        self.values = list(values)

    def randrange(self, *bounds: int) -> object:
        return self.values.pop(0)

    def choice(self, options: object) -> object:
        return self.values.pop(0)


DAY = (datetime.date(2024, 3, 12) - datetime.date(1950, 1, 1)).days
DEALS = {
    "March 12, 2024": ("date", (DAY, "long")),
    "Tuesday, March 12, 2024": ("date", (DAY, "full")),
    "in 3 days": ("relative_time", ("day", 3, 1)),
    "2 months ago": ("relative_time", ("month", 2, -1)),
    "12.5 kilometers": ("unit", (0, 0, 12.5, "length-kilometer")),
    "234,567": ("number", (0, 0, 234567)),
    "10,500 euros": ("money", (0, 0, 10500, "EUR", "name")),
    "3:45 PM": ("time", (15, 45)),
}


@pytest.mark.parametrize(("code", "english", "wanted"), [(c, e, w) for c, pairs in BY_HAND.items() for e, w in pairs.items()])
def test_known_answers(code: str, english: str, wanted: str) -> None:
    if english not in DEALS:
        names = {p.source: p.target for p in cldr.generate(code, ["territory"], 1000, seed=1)}
        assert names[english] == wanted
        return
    kind, dealt = DEALS[english]
    pairs = [
        cldr.Pair(code, cldr.plain(s), cldr.plain(t), "", kind)
        for s, t in cldr._renderings(cldr._DRAWN[kind], locale(code).cldr, 1, Dealt(*dealt))
    ]
    assert [(p.source.replace(".00", ""), p.target.replace(",00", "")) for p in pairs] == [(english, wanted)]


@pytest.mark.parametrize("code", [c for c in LOCALES if c != "en"])
def test_every_locale_is_served_with_one_plain_answer_per_source(code: str) -> None:
    pairs = cldr.generate(code, list(cldr.KINDS), 270, seed=7)
    assert len(pairs) == 270
    assert len({p.source for p in pairs}) == 270
    assert pairs == cldr.generate(code, list(cldr.KINDS), 270, seed=7)
    assert pairs != cldr.generate(code, list(cldr.KINDS), 270, seed=8)
    for p in pairs:
        assert p.source.casefold() != p.target.casefold()
        assert not set("\u00a0\u202f\u200e\u200f\n") & set(p.source + p.target), p
        assert not any(unit in p.target for unit in ("length-", "mass-", "volume-", "duration-")), p
    assert ("time" in {p.kind for p in pairs}) == (code not in ("ko_KR", "hi_IN"))  # Hindi writes it as English does


def test_unknown_kind_and_locale_are_refused() -> None:
    with pytest.raises(InputError, match="cldr_kinds=weather"):
        cldr.generate("de_DE", ["weather"], 10, seed=1)
    with pytest.raises(InputError, match="locale xx_XX is unknown"):
        locale("xx_XX")


def test_recipe_has_27_languages_with_a_name_of_their_own() -> None:
    assert len(LOCALES) == len({row.english for row in LOCALES.values()}) == len({row.cldr for row in LOCALES.values()}) == 27


def test_a_language_is_found_as_people_write_it() -> None:
    assert [find(w).code for w in ("de", "pt-BR", "German", "zh_TW", "es", "Portuguese (Brazil)", "nb", "fr")] == [
        "de_DE", "pt_BR", "de_DE", "zh_TW", "es_ES", "pt_BR", "no_NO", "fr_FR",
    ]  # fmt: skip
    with pytest.raises(InputError, match="Klingon"):
        find("Klingon")
