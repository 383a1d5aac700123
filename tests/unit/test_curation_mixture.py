"""The mixture: shares that add up, languages lifted by the temperature, none asked for more than it has; the same draw in every run."""

from collections import Counter

import pytest

from megatron_tower.curation import tokens
from megatron_tower.curation.mixture import plan
from megatron_tower.data.templates import PARALLEL

HAS = {("monolingual", "en"): 800.0, ("monolingual", "de"): 100.0, ("monolingual", "is"): 10.0, ("parallel", "de"): 50.0}
SHARES = {"monolingual": 0.66, "parallel": 0.33, "instruction": 0.01}


def tokens_of(fractions: dict) -> dict:
    return {group: fraction * HAS[group] for group, fraction in fractions.items()}


def test_all_is_drawn_where_no_size_is_asked() -> None:
    assert set(plan(HAS, SHARES, 0, 1.0).values()) == {1.0}


def test_a_part_gets_its_share() -> None:
    drawn = tokens_of(plan(HAS, SHARES, 300, 1.0))
    assert sum(count for (part, _), count in drawn.items() if part == "monolingual") == pytest.approx(198)
    assert drawn["monolingual", "en"] / drawn["monolingual", "de"] == pytest.approx(8)
    assert drawn["parallel", "de"] == 50  # all there is of 99: the blend repeats it


def test_temperature_lifts_small_languages_up_to_what_they_have() -> None:
    flat = tokens_of(plan(HAS, SHARES, 300, 0.0))
    assert flat["monolingual", "is"] == 10 and flat["monolingual", "de"] == pytest.approx(94) == flat["monolingual", "en"]
    half = tokens_of(plan(HAS, SHARES, 30, 0.5))
    assert half["monolingual", "en"] / half["monolingual", "de"] == pytest.approx(8**0.5)
    assert sum(count for (part, _), count in half.items() if part == "monolingual") == pytest.approx(19.8)


def test_more_than_there_is() -> None:
    assert set(plan(HAS, SHARES, 10_000, 0.3).values()) == {1.0}


def test_the_draw_is_a_function_of_the_name() -> None:
    drawn = [tokens.draw(f"row {i}", 0.3) for i in range(10_000)]
    assert 2_800 < sum(drawn) < 3_200 and drawn == [tokens.draw(f"row {i}", 0.3) for i in range(10_000)]
    assert all(tokens.draw(f"row {i}", 0.4) for i, was in enumerate(drawn) if was)  # a larger draw holds the smaller
    assert not tokens.draw("x", 0.0) and tokens.draw("x", 1.0)


def pair(i: int, document: str | None = None, to: str = "de_DE") -> dict:
    return {"id": f"{to}/{i}", "source_locale": "en", "target_locale": to, "source": f"source {i}", "target": f"target {i}"} | (
        {"document": document} if document else {}
    )


def test_pairs_of_a_document_become_one_text_each_way() -> None:
    found = list(tokens.texts([pair(1, "a"), pair(2, "a"), pair(3, "b"), pair(4), pair(5)], 1000))
    assert [group for group, _, _ in found] == [("parallel", "de_DE")] * 8
    for i, members in enumerate([(1, 2), (3,), (4,), (5,)]):
        both = [text for _, text, _ in found[2 * i : 2 * i + 2]]
        sources, targets = "\n".join(f"source {n}" for n in members), "\n".join(f"target {n}" for n in members)
        assert all(sources in text and targets in text for text in both)
        assert both[0].index(sources) < both[0].index(targets) and both[1].index(targets) < both[1].index(sources)


def test_a_document_is_no_longer_than_asked() -> None:
    found = list(tokens.texts([pair(i, "a") for i in range(10)], 3 * len("source 0target 0")))
    assert [text.count("source ") + text.count("Source ") - text.count("source text") for _, text, _ in found[::2]] == [3, 3, 3, 1]


def test_every_template_is_drawn_in_every_language_of_a_pair() -> None:
    """Alike often, both ways, and told with the locale of its words, which the text indeed begins in."""
    found = [(text, said) for _, text, said in tokens.texts([pair(i) for i in range(1000)], 1000)]
    counts = Counter(said for _, said in found)
    assert {template for template, _ in counts} == set(PARALLEL)
    assert all(350 < sum(n for (name, _), n in counts.items() if name == template) < 450 for template in PARALLEL)
    begins = {"en": "Translat", "de_DE": "Übersetzung (", "en, de_DE": "Englis", "de_DE, en": "Deutsch: "}
    for text, (template, spoken) in found:
        first = ("English: ", "German: ") if template == "english_names/1" else begins[spoken]
        assert text.startswith(first), (template, spoken)
    assert counts["target_titled/1", "de_DE"] > 150 < counts["target_titled/1", "en"]
    assert found == [(text, said) for _, text, said in tokens.texts([pair(i) for i in range(1000)], 1000)]


def test_documents_stay_as_they_are() -> None:
    assert list(tokens.texts([{"id": "x", "locale": "fr_FR", "text": "a\nb"}], 10)) == [(("monolingual", "fr_FR"), "a\nb", ())]
