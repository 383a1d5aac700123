"""The reward of verifiable translation: what it is worth to cheat, to half obey, to say more than was asked."""

import subprocess
import sys
from itertools import pairwise

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import cldr
from megatron_tower.data.verifiable import generate
from megatron_tower.rewards.translation import score

SOURCE = "Please save your changes before you leave this page on March 12, 2024."
REFERENCE = "Bitte speichern Sie Ihre Änderungen, bevor Sie diese Seite am 12. März 2024 verlassen."
DATE = {"family": "date", "form": "long", "date": "2024-03-12"}


def item(*constraints: dict, source: str = SOURCE, reference: str | None = REFERENCE, target: str = "de_DE") -> dict:
    case = {"source": source, "source_locale": "en", "target_locale": target, "reference": reference}
    return {"reward": "translation", "check": {**case, "constraints": [*constraints, {"family": "bare"}]}, "answer": None}


@pytest.fixture(scope="module")
def items() -> list[dict]:
    pairs = [pair for code in ("de_DE", "es_ES", "fr_FR", "ja_JP", "ru_RU") for pair in cldr.generate(code, list(cldr.KINDS), 180, seed=2)]
    return generate(pairs, 400, seed=9)


@pytest.mark.parametrize("constant", ["OK", "Ja", "12. März 2024", '{"translation": "OK"}', "{name}", "- a\n- b", "1.234,56 €", "OK " * 12])
def test_a_constant_is_worth_next_to_nothing(items: list[dict], constant: str) -> None:
    assert sum(score(i, constant) for i in items) / len(items) < 0.05


def test_a_right_answer_to_another_item_is_worth_little(items: list[dict]) -> None:
    assert sum(score(a, b["answer"]) for a, b in pairwise(items)) / len(items) < 0.1


def test_empty_and_copied_are_worth_nothing_whatever_they_wear(items: list[dict]) -> None:
    for i in items:
        source = i["check"]["source"]
        for answer in ("", " \n", source, source.upper(), f" {source} "):
            assert score(i, answer) == 0, (answer, i)
        assert max(score(i, f"{source}!"), score(i, f"«{source}»")) < 0.1, i


def test_each_broken_constraint_costs_its_share() -> None:
    asked = item(DATE, {"family": "keep", "terms": ["Seite"]}, {"family": "length", "form": "characters", "limit": len(REFERENCE)})
    assert score(asked, REFERENCE) == 1
    assert score(asked, REFERENCE.replace("12. März", "13. März")) == pytest.approx(3 / 4)
    assert score(asked, REFERENCE.replace("12. März", "13. März").replace("Seite", "seite")) == pytest.approx(2 / 4)


def test_adequacy_falls_with_what_is_missing_and_reaches_1_before_the_one_wording() -> None:
    reworded = "Bitte speichern Sie die Änderungen, ehe Sie diese Seite am 12. März 2024 verlassen."
    poor = "Bitte sichern Sie alles bis zum 12. März 2024."
    assert score(item(DATE), reworded) == 1
    assert 0 < score(item(DATE), poor) < 0.6
    assert score(item(DATE), "Der Bericht vom 12. März 2024 liegt noch nicht vor.") < score(item(DATE), poor)
    assert score(item(), "Unsere Katze schläft gern auf dem warmen Sofa.") == 0


@pytest.mark.parametrize(
    "answer",
    [
        "Please store all your changes before leaving this page on 12. März 2024.",  # English
        "Enregistrez vos modifications avant de quitter cette page le 12. März 2024.",  # French
        "Пожалуйста, сохраните изменения перед выходом со страницы 12. März 2024.",
        REFERENCE + " " + "Und noch viel mehr. " * 12,  # runs on
        "lorem ipsum dolor sit amet",
    ],
)
def test_wrong_language_and_running_on_are_worth_nothing(answer: str) -> None:
    assert score(item(DATE), answer) == 0


def test_scandinavian_neighbours_pass_and_short_text_is_not_judged() -> None:
    norwegian = item({"family": "bare"}, source="Save the page now, please", reference="Lagre siden nå, er du snill", target="no_NO")
    assert score(norwegian, "Gem siden nu, er du sød og rar") > 0  # Danish, close
    assert score(item(source="Cancel", reference="Abbrechen"), "Abbruch") > 0


@pytest.mark.parametrize(
    "said",
    ["Sure! Here is the translation: {}", "Translation: {}", "German: {}", "{}\n\nNote: done.", "```\n{}\n```", "{0} {0}", SOURCE + " {}"],
)
def test_saying_more_costs(said: str) -> None:
    assert score(item(DATE), said.format(REFERENCE)) <= 0.5


def test_saying_it_twice_costs_even_where_it_repeats_itself() -> None:
    assert score(item(source="9:21 PM", reference="21:21"), "21:21 21:21") == 0
    assert score(item(source="no no, never", reference="nein nein, niemals"), "nein nein, niemals") == 1


def test_json_is_judged_by_the_translation_inside() -> None:
    asked = item(DATE, {"family": "json", "key": "text"})
    assert score(asked, f'{{"text": "{REFERENCE}"}}') == 1
    assert score(asked, f'{{"text": "{SOURCE}"}}') == score(asked, '{"text": ""}') == score(asked, '{"text": "OK"}') == 0
    assert 0.5 < score(asked, REFERENCE) < 1  # a good translation, not in JSON


def test_without_a_reference_only_constraints_count() -> None:
    asked = item(DATE, reference=None)
    assert score(asked, "Bitte alles bis zum 12. März 2024 speichern.") == 1
    assert score(asked, "Bitte alles bis zum 13. März 2024 speichern.") == 0.5
    assert score(asked, SOURCE) == score(asked, "") == score(asked, "Сохраните до 12. März 2024 все изменения") == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": None}, "source"),
        ({"target_locale": "xx_XX"}, "xx_XX"),
        ({"constraints": []}, "constraints"),
        ({"constraints": [{"family": "weather"}]}, "weather"),
        ({"constraints": ["date"]}, "date"),
        ({"constraints": [{"family": "date", "form": "long"}]}, "lacks date"),
        ({"constraints": [{"family": "date", "form": "long", "date": "2024-02-31"}]}, "2024-02-31"),
        ({"constraints": [{"family": "date", "form": "roman", "date": "2024-02-01"}]}, "roman"),
        ({"constraints": [{"family": "length", "form": "words", "limit": "3"}]}, "limit"),
        ({"constraints": [{"family": "unit", "form": "name", "value": 1, "unit": "ell"}]}, "ell"),
    ],
)
def test_a_malformed_check_is_named(change: dict, named: str) -> None:
    broken = item(DATE)
    broken["check"] |= change
    with pytest.raises(InputError, match=named):
        score(broken, REFERENCE)
    with pytest.raises(InputError, match="da_DK"):
        score(item({"family": "formality", "form": "formal"}, reference=None, target="da_DK"), "Og De?")
    for missing in ({}, {"check": None}, {"check": {"source": "a"}}):
        with pytest.raises(InputError, match="check lacks"):
            score(missing, REFERENCE)


def test_no_torch_is_imported() -> None:
    code = "import sys; import megatron_tower.rewards.translation; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
