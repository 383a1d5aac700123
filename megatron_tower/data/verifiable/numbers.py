"""`number` and `currency`: the target locale's grouping, decimal sign, currency sign and its place."""

import random
import re
from dataclasses import replace

from babel import Locale, numbers

from megatron_tower.data.pair import plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, cldr, contains, is_number, misread, one_of, swapped

NUMBER_FORMS = ("grouped", "plain")
CURRENCY_FORMS = ("symbol", "code", "name")
_SIGNS = {"EUR": "€", "USD": "$", "GBP": "£", "JPY": "¥", "CHF": "CHF"}
_ENGLISH = {"EUR": "euro", "USD": "US dollar", "GBP": "British pound", "JPY": "Japanese yen", "CHF": "Swiss franc"}
_TURNED = str.maketrans({".": ",", ",": ".", " ": ","})


def read(english: str) -> float:
    """The first number of an English text."""
    return float(re.search(r"\d[\d,]*(\.\d+)?", english)[0].replace(",", ""))


def drawn(rng: random.Random) -> float:
    """Two decimals below 1,000, none from 10,000 on: four-digit integers are grouped by CLDR, by Spanish and Polish writers not."""
    return rng.choice((rng.randrange(101, 100000) / 100, rng.randrange(10000, 1000000)))


def number(value: float, form: str, code: str) -> str:
    return plain(numbers.format_decimal(value, locale=cldr(code), group_separator=form == "grouped"))


def _propose_number(draft: Draft, rng: random.Random) -> Proposal:
    form = rng.choice(NUMBER_FORMS)
    if draft.is_value and draft.kind != "number":
        return None
    value = read(draft.english) if draft.kind == "number" else drawn(rng)
    written = number(value, form, draft.target_locale)
    if draft.kind == "number":
        changed = replace(draft, reference=written)
    else:
        changed = draft.appended(number(value, "grouped", draft.source_locale), written)
    return changed, {"form": form, "value": value}


def _check_number(constraint: dict, answer: str, case: dict) -> bool:
    return contains(answer, number(constraint["value"], constraint["form"], case["target_locale"]))


def _damage_number(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    right = number(constraint["value"], constraint["form"], case["target_locale"])
    other = number(constraint["value"], "plain" if constraint["form"] == "grouped" else "grouped", case["target_locale"])
    turned = right.translate(_TURNED)
    return {
        "other_number": swapped(answer, right, misread(right)),
        "other_number_form": swapped(answer, right, next(form for form in (turned, other, f"{right}0") if form != right)),
    }


def money(value: float, currency: str, form: str, code: str) -> str:
    """As CLDR writes it; the code stands where the sign would, set off by a space."""
    if form == "name":
        text = numbers.format_currency(value, currency, locale=cldr(code), format_type="name")
    else:
        pattern = Locale.parse(cldr(code)).currency_formats["standard"].pattern
        pattern = re.sub(r"^¤\s?", "¤¤ ", re.sub(r"\s?¤$", " ¤¤", pattern.split(";")[0])) if form == "code" else pattern
        text = numbers.format_currency(value, currency, pattern, locale=cldr(code))
    return plain(text)


def accepted(constraint: dict, code: str) -> list[str]:
    """The locale's form, with its own currency sign ("US$") or the general one, whole amounts with decimals or without."""
    value, currency, form = constraint["value"], constraint["currency"], constraint["form"]
    right = money(value, currency, form, code)
    forms = [right]
    if form == "symbol":
        forms.append(right.replace(plain(numbers.get_currency_symbol(currency, cldr(code))), _SIGNS[currency]))
    if form == "code":
        bare = right.replace(currency, "").strip()
        forms += [f"{currency} {bare}", f"{bare} {currency}"]
    if value == int(value):
        whole = re.compile(r"(?<=\d)[.,]00(?!\d)")
        forms += [whole.sub("", written) for written in forms]
    return forms


def _propose_currency(draft: Draft, rng: random.Random) -> Proposal:
    form = rng.choice(CURRENCY_FORMS)
    if draft.is_value and draft.kind != "money":
        return None
    if draft.kind == "money":
        value, currency = read(draft.english), _currency(draft.english)
        changed = replace(draft, reference=money(value, currency, form, draft.target_locale))
    else:
        value, currency = drawn(rng), rng.choice(list(_SIGNS))
        value = round(value) if currency == "JPY" else value
        shown = money(value, currency, rng.choice(("symbol", "name")), draft.source_locale)
        changed = draft.appended(shown, money(value, currency, form, draft.target_locale))
    return changed, {"form": form, "value": value, "currency": currency}


def _currency(english: str) -> str:
    return next(code for code in _SIGNS if any(name in english for name in (_SIGNS[code], code, _ENGLISH[code])))


def _check_currency(constraint: dict, answer: str, case: dict) -> bool:
    return any(contains(answer, form) for form in accepted(constraint, case["target_locale"]))


def _damage_currency(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    value, currency, form, code = constraint["value"], constraint["currency"], constraint["form"], case["target_locale"]
    right = money(value, currency, form, code)
    other_currency = "GBP" if currency != "GBP" else "EUR"
    other_form = "name" if form != "name" else "symbol"
    return {
        "other_amount": swapped(answer, right, misread(right)),
        "other_currency": swapped(answer, right, money(value, other_currency, form, code)),
        "other_currency_form": swapped(answer, right, money(value, currency, other_form, code)),
    }


NUMBER = Family("number", _propose_number, _check_number, _damage_number, needs={"form": one_of(NUMBER_FORMS), "value": is_number})
CURRENCY = Family(
    "currency",
    _propose_currency,
    _check_currency,
    _damage_currency,
    needs={"form": one_of(CURRENCY_FORMS), "value": is_number, "currency": one_of(_SIGNS)},
)
