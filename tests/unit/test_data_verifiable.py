"""Verifiable translation items: every family in every locale, its right answers, and the damage its checker must see."""

import random
import string
from collections import Counter

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import cldr
from megatron_tower.data.examples import Example
from megatron_tower.data.locales import LOCALES
from megatron_tower.data.pair import Pair
from megatron_tower.data.verifiable import FAMILIES, damaged, example, generate, kept
from megatron_tower.data.verifiable.wording import WORDINGS, wording
from megatron_tower.rewards.translation import score

TARGETS = [code for code in LOCALES if code != "en"]
NO_CAPITALS = {"hi_IN", "zh_CN", "zh_TW", "ja_JP", "ko_KR"}
ONE_ADDRESS = {"is_IS", "da_DK", "sv_SE", "no_NO", "nn_NO"}
LEFT_OUT = {"casing": NO_CAPITALS, "formality": ONE_ADDRESS}
WORTH_NOTHING = ("empty", "white_space", "copied_source", "wrong_language", "constant")


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair]]:
    return {code: cldr.generate(code, list(cldr.KINDS), 90, seed=5) for code in TARGETS}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_locale_the_reference_scores_1_and_all_damage_less(family: str, pairs: dict[str, list[Pair]]) -> None:
    served = set()
    for code in TARGETS:
        items = [i for i in generate(pairs[code], 7, seed=3, families=[family], composed=0) if i["check"]["target_locale"] == code]
        served |= {code} if len(items) > 2 else set()
        for item in items[:3]:
            assert item["reward"] == "translation" and item["family"] == family and item["locale"] == code
            assert score(item, item["answer"]) == 1, item
            variants = damaged(item, random.Random(1))
            own = [name for name in variants if name.startswith(f"{family}.")]
            assert len(variants) >= 14 and len(own) >= 2
            for name, text in variants.items():
                value = score(item, text)
                assert value < 1, (name, text, item)
                assert value < 0.05 or name not in WORTH_NOTHING, (name, value, text, item)
            for name in own:
                assert not kept(item["check"], variants[name])[0], (name, variants[name], item)
    assert set(TARGETS) - served == LEFT_OUT.get(family, set())


def test_composed_items_ask_for_two_or_three_things_and_lose_a_share_for_each(pairs: dict[str, list[Pair]]) -> None:
    everything = [pair for some in pairs.values() for pair in some]
    items = generate(everything, 300, seed=11, composed=1.0)
    assert len(items) == 300
    sizes = Counter(len(item["family"].split("+")) for item in items)
    assert sizes[2] > 130 and sizes[3] > 40
    assert len({item["family"] for item in items}) > 100
    for item in items:
        names = item["family"].split("+")
        assert [c["family"] for c in item["check"]["constraints"]] == names + ["bare"] * ("bare" not in names)
        assert not any(name in FAMILIES[other].excludes for name in names for other in names)
        assert score(item, item["answer"]) == 1
        for name, text in damaged(item, random.Random(2)).items():
            assert score(item, text) < 1, (name, text, item)


def test_the_same_seed_gives_the_same_items_and_prompts_are_distinct(pairs: dict[str, list[Pair]]) -> None:
    some = pairs["de_DE"] + pairs["ja_JP"]
    first = generate(some, 300, seed=1)
    assert first == generate(some, 300, seed=1) != generate(some, 300, seed=2)
    assert len({item["prompt"] for item in first}) == len(first) == 300
    assert {"en", "de_DE", "ja_JP"} == {item["check"]["target_locale"] for item in first}
    assert len(generate(some[:9], 50, seed=1, families=["bare"], own_language=0)) < 19  # stops when the pairs run dry
    assert generate([], 5, seed=1) == []
    with pytest.raises(InputError, match="families: weather"):
        generate(some, 5, seed=1, families=["weather"])


def test_instructions_come_in_the_target_language(pairs: dict[str, list[Pair]]) -> None:
    for code in TARGETS:
        items = generate(pairs[code], 5, seed=1, families=["bare"], composed=0, own_language=1.0)
        asked = {item["prompt"].split("\n")[0] for item in items if item["check"]["target_locale"] == code}
        assert asked == {wording(code)["bare"]} and asked != {WORDINGS["en"]["bare"]}
    items = generate(pairs["fr_FR"], 300, seed=1, own_language=0.3)
    english = tuple(sentence.split("{")[0] for sentence in WORDINGS["en"].values())
    own = sum(not item["prompt"].startswith(english) for item in items) / len(items)
    assert 0.18 < own < 0.35  # 0.3 of those into French


@pytest.mark.parametrize("language", WORDINGS)
def test_each_wording_says_what_the_english_says(language: str) -> None:
    table, english = WORDINGS[language], WORDINGS["en"]
    codes = {code for code, row in LOCALES.items() if language in (code, row.language)}
    lacking = set()
    if codes & NO_CAPITALS:
        lacking |= {"casing.upper", "casing.lower", "casing.title"}
    if codes & ONE_ADDRESS:
        lacking |= {"formality.formal", "formality.informal"}
    if language in ("zh_CN", "zh_TW", "ja"):
        lacking |= {"length.words"}
    assert set(english) - set(table) == lacking and set(table) <= set(english)
    assert len(set(table.values())) == len(table)
    for name, sentence in table.items():
        assert _names(sentence) - {"language", "script"} == _names(english[name]) - {"language", "script"}, sentence


def _names(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_prompt_and_answer_read_as_a_person_would_write_them() -> None:
    pair = Pair("de_DE", "March 12, 2024", "12. März 2024", "cldr/date", "date")
    items = generate([pair], 40, seed=4, families=["date", "json", "quotes"], own_language=0)
    found = {item["prompt"]: item["answer"] for item in items}
    released = "Translate the following English source text to German:\nEnglish: {}\nGerman: "
    assert found["Write the date in ISO 8601 form (YYYY-MM-DD).\n" + released.format("March 12, 2024")] == "2024-03-12"
    assert found["Use the quotation marks usual in German.\n" + released.format("“March 12, 2024”")] == "„12. März 2024“"
    asked = 'Answer with a JSON object that has the translation under the key "text".\n'
    assert found[asked + released.format("March 12, 2024")] == '{"text": "12. März 2024"}'
    assert example(items[0]) == Example(items[0]["prompt"], items[0]["answer"], "translation", "verifiable", "de_DE")


def test_glossary_terms_are_found_in_longer_pairs() -> None:
    pairs = [
        Pair("de_DE", "User", "Benutzer", "a"),
        Pair("de_DE", "The user was not found on this device", "Der Benutzer wurde auf diesem Gerät nicht gefunden", "a"),
    ]
    items = generate(pairs, 20, seed=1, families=["glossary"], composed=0, own_language=0)
    terms = {(c["source_term"], c["term"]) for i in items if len(i["check"]["source"]) > 30 for c in i["check"]["constraints"][:1]}
    assert ("User", "Benutzer") in terms


# What a person would call right or wrong, family by family: (target, constraint, right, wrong)
BY_HAND = [
    ("de_DE", {"family": "date", "form": "numeric", "date": "2024-03-05"}, "am 05.03.2024", "am 03/05/2024"),
    ("de_DE", {"family": "date", "form": "numeric", "date": "2024-03-05"}, "5. 3. 2024", "3.5.2024"),
    ("fr_CA", {"family": "date", "form": "numeric", "date": "2024-03-05"}, "2024-03-05", "05/03/2024"),
    ("hu_HU", {"family": "date", "form": "numeric", "date": "2024-03-05"}, "2024.03.05.", "05.03.2024."),
    ("ja_JP", {"family": "date", "form": "long", "date": "2024-03-05"}, "2024年3月5日", "2024/03/05"),
    ("es_ES", {"family": "date", "form": "long", "date": "2024-03-05"}, "el 5 de marzo de 2024", "el 15 de marzo de 2024"),
    ("fr_FR", {"family": "number", "form": "grouped", "value": 234567}, "234\u202f567 pages", "234,567 pages"),
    ("de_DE", {"family": "number", "form": "grouped", "value": 1234.5}, "1.234,5", "1.234,56"),
    ("hi_IN", {"family": "number", "form": "grouped", "value": 234567}, "2,34,567", "234,567"),
    ("de_DE", {"family": "number", "form": "plain", "value": 12345}, "12345", "12.345"),
    ("de_DE", {"family": "currency", "form": "symbol", "value": 12345, "currency": "EUR"}, "12.345 €", "€12.345"),
    ("de_DE", {"family": "currency", "form": "code", "value": 12.5, "currency": "USD"}, "USD 12,50", "$12,50"),
    ("fr_CA", {"family": "currency", "form": "code", "value": 765828, "currency": "EUR"}, "765 828 EUR", "765 828,00 euros"),
    ("fr_CA", {"family": "currency", "form": "symbol", "value": 9.99, "currency": "USD"}, "9,99 $", "9.99 $"),
    ("fi_FI", {"family": "currency", "form": "name", "value": 12.5, "currency": "EUR"}, "12,50 euroa", "12,50 €"),
    ("de_DE", {"family": "unit", "form": "converted", "value": 19.3, "unit": "length-kilometer"}, "19 km", "20,5 km"),
    ("ru_RU", {"family": "unit", "form": "converted", "value": 19.3, "unit": "length-kilometer"}, "19,3 километра", "12 миль"),
    ("zh_CN", {"family": "unit", "form": "symbol", "value": 19.3, "unit": "length-kilometer"}, "19.3 km", "19.3"),
    ("de_DE", {"family": "unit", "form": "name", "value": 12.5, "unit": "length-meter"}, "12,5 Meter", "12,5 m"),
    ("de_DE", {"family": "unit", "form": "symbol", "value": 12.5, "unit": "length-meter"}, "12,5 m", "12,5 mm"),
    ("de_DE", {"family": "glossary", "source_term": "page", "term": "Seite"}, "Die Seiten", "Die Webseite"),
    ("de_DE", {"family": "keep", "terms": ["BlueHarbor"]}, "BlueHarbor öffnen", "Blueharbor öffnen"),
    ("de_DE", {"family": "placeholder", "marks": ["{name}", "%s"]}, "{name} für %s", "{Name} für %s"),
    ("de_DE", {"family": "placeholder", "marks": ["<b>", "</b>"]}, "<b>Ja</b>", "</b>Ja<b>"),
    ("de_DE", {"family": "casing", "form": "upper"}, "STRASSE 5", "STRAßE 5"),
    ("ru_RU", {"family": "casing", "form": "title"}, "Новая Страница", "Новая страница"),
    ("fr_FR", {"family": "formality", "form": "formal"}, "Comment allez-vous ?", "Comment vas-tu ?"),
    ("de_DE", {"family": "formality", "form": "informal"}, "Wie geht es dir?", "Wie geht es Ihnen?"),
    ("ko_KR", {"family": "formality", "form": "formal"}, "저장했습니다.", "저장했어."),
    ("de_DE", {"family": "length", "form": "words", "limit": 3}, "eins zwei drei", "eins zwei drei vier"),
    ("ja_JP", {"family": "length", "form": "characters", "limit": 4}, "保存する", "保存します"),
    ("fr_FR", {"family": "quotes"}, "l’option «\u00a0Aide\u00a0»", "l’option “Aide”"),
    ("pl_PL", {"family": "quotes"}, "„Pomoc”", "„Pomoc“"),
    ("uk_UA", {"family": "script", "script": "Cyrillic"}, "Зберегти 5", "Збeрегти 5"),  # a Latin e
    ("ja_JP", {"family": "script", "script": "Kana"}, "設定をひらく", "設定を open"),
    ("de_DE", {"family": "json", "key": "text"}, '{"text": "Ja"}', '{"text": "Ja"} '[:-2]),
    ("de_DE", {"family": "json", "key": "text"}, '\n{"text": "Ja"}\n', '{"translation": "Ja"}'),
    ("de_DE", {"family": "list", "form": "dash", "items": 2}, "- eins\n- zwei\n", "- eins\n* zwei"),
    ("de_DE", {"family": "list", "form": "number", "items": 2}, "1. eins\n2. zwei", "1. eins\n1. zwei"),
    ("de_DE", {"family": "bare"}, "Hallo", "Übersetzung: Hallo"),
]


@pytest.mark.parametrize(("code", "constraint", "right", "wrong"), BY_HAND)
def test_checks_agree_with_a_person(code: str, constraint: dict, right: str, wrong: str) -> None:
    case = {"source": "What it says", "source_locale": "en", "target_locale": code, "reference": None, "constraints": [constraint]}
    assert kept(case, right) == [True]
    assert kept(case, wrong) == [False]


def test_by_hand_covers_every_family() -> None:
    assert {constraint["family"] for _, constraint, _, _ in BY_HAND} == set(FAMILIES)
