"""Judgement files: what is read, what is refused and where; the items made of them and their order of options."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import tasks
from megatron_tower.data.judgements import GAPS, Judgement, against_damaged, items, ranking_prompt, read
from megatron_tower.data.pair import Pair
from megatron_tower.rewards.preference import score

DA = """lp\tsystem\tdoc\tseg_id\tsrc\tmt\tda
en-de\tone\tnews\t1\tThe "big" house\tDas "große" Haus\t90
en-de\ttwo\tnews\t1\tThe "big" house\tDas Haus\t60
en-de\tthree\tnews\t1\tThe "big" house\tDas große Haus\t80
en-de\ttwo\tnews\t1\tThe "big" house\tDas Haus\t40
de-en\tone\tnews\t2\tGuten Tag\tGood day\t100
"""


def write(tmp_path: Path, text: str, name: str = "rated.tsv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_tsv_is_grouped_by_segment_and_ratings_of_one_translation_are_averaged(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, DA))
    assert first == Judgement(
        "en", "de_DE", 'The "big" house', (('Das "große" Haus', 90.0), ("Das Haus", 50.0), ("Das große Haus", 80.0)), "da"
    )
    assert (second.source_locale, second.target_locale, second.translations) == ("de_DE", "en", (("Good day", 100.0),))


def test_jsonl_reads_as_tsv_does(tmp_path: Path) -> None:
    header, *lines = (line.split("\t") for line in DA.strip().split("\n"))
    objects = [dict(zip(header, line, strict=True)) for line in lines]
    for row in objects:
        row["source_locale"], row["target_locale"] = row.pop("lp").split("-")
        row["da"] = float(row["da"])
    text = "\n".join(json.dumps(row) for row in objects) + "\n\n"
    assert read(write(tmp_path, text, "rated.jsonl")) == read(write(tmp_path, DA))


def test_a_higher_score_is_better_whatever_the_column_is_called(tmp_path: Path) -> None:
    for column, good, bad in (("score", 0.5, -0.5), ("da", 80, 20), ("mqm", 0, -5), ("penalty", 0, 5)):
        rated = f"lp\tsource\ttarget\t{column}\nen-fr\tHouse\tchaise\t{bad}\nen-fr\tHouse\tmaison\t{good}\n"
        (item,) = items(*read(write(tmp_path, rated)))
        assert f"\n{item['answer']}: maison" in item["prompt"], column


def test_translations_of_the_same_words_elsewhere_are_not_compared(tmp_path: Path) -> None:
    for column in ("seg_id", "doc"):
        rated = f"lp\t{column}\tsrc\tmt\tda\nen-de\t1\tOpen\tOffen\t90\nen-de\t2\tOpen\tÖffnen\t10\n"
        assert [len(j.translations) for j in read(write(tmp_path, rated))] == [1, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "lp\tsrc\tmt\tda\nen-de\ta\tb\t1\nen-de\ta\tb\n", r"a\.tsv:3: 3 columns where the header has 4"),
        ("a.tsv", "lp\tsrc\tmt\tda\n\nen-de\ta\tb\tgood\n", r"a\.tsv:3: da is 'good', no number"),
        ("a.tsv", "lp\tsrc\tmt\tda\nen-de\ta\tb\tnan\n", r"a\.tsv:2: da is 'nan', no number"),
        ("a.tsv", "lp\tsrc\tmt\tmqm\nen-de\ta\tb\t3\n", r"a\.tsv:2: mqm is 3.0, but a higher score is better .* penalty"),
        ("a.tsv", "lp\tsrc\tmt\tda\nen-de\ta\t \t3\n", r"a\.tsv:2: mt is empty"),
        ("a.tsv", "lp\tsrc\tref\tda\nen-de\ta\tb\t3\n", r"a\.tsv:2: none of target, translation, mt, hyp among lp, src, ref, da"),
        ("a.tsv", "lp\tsrc\tmt\tda\nen-xx\ta\tb\t3\n", r"a\.tsv:2: language xx is unknown"),
        ("a.tsv", "lp\tsrc\tmt\tda\nende\ta\tb\t3\n", r"a\.tsv:2: lp is 'ende': write two languages as in en-de"),
        ("a.tsv", "src\tmt\tda\na\tb\t3\n", r"a\.tsv:2: no source_locale and target_locale, nor lp"),
        ("a.tsv", "", r"a\.tsv holds no judgement"),
        ("a.jsonl", '{"lp": "en-de", "src": "a", "mt": "b", "da": 3}\n{"lp": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a JSON list"),
        ("a.jsonl", '{"lp": "en-de", "src": "a", "mt": 7, "da": 3}\n', r"a\.jsonl:1: mt is empty or no text"),
        ("a.jsonl", '{"lp": "en-de", "src": "a", "mt": "b", "da": null}\n', r"a\.jsonl:1: da is None, no number"),
        ("a.csv", "x", r"read from \.tsv or \.jsonl, not \.csv"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, text, name))


def test_missing_file_and_wrong_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tsv is missing"):
        read(tmp_path / "none.tsv")
    path = tmp_path / "latin.tsv"
    path.write_bytes("lp\tsrc\tmt\tda\nen-de\ta\tü\t3\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(path)


def test_prompt_is_the_one_that_sft_teaches() -> None:
    pair = Pair("de_DE", "Open the red door", "Öffne die rote Tür", "x")
    taught = tasks._ranking(pair, [pair], random.Random(3))
    shown = [line[3:] for line in taught.prompt.split("\n")[2:]]
    assert ranking_prompt("en", pair.source, shown) == taught.prompt


def test_prompt_of_another_source_and_of_three() -> None:
    assert ranking_prompt("pt_BR", "Olá", ["Hello", "Bye", "Hi"]) == (
        "Which translation is best, A, B or C?\nPortuguese (Brazil): Olá\nA: Hello\nB: Bye\nC: Hi"
    )


def judgement(*scores: float, scale: str = "score", source: str = "Source") -> Judgement:
    return Judgement("en", "de_DE", source, tuple((f"Text {i}", score) for i, score in enumerate(scores)), scale)


def test_pairs_whose_scores_are_too_close_are_left_out() -> None:
    assert list(items(judgement(1.0, 1.0))) == []
    assert len(list(items(judgement(1.0, 0.99)))) == 1
    assert len(list(items(judgement(80, 60, 50, scale="da")))) == 1  # 80 against 50
    assert len(list(items(judgement(80, 60, 50, scale="da"), gap=10))) == 3
    assert len(list(items(judgement(80, 60, 50, scale="da"), gap=20.5))) == 1
    assert GAPS["da"] == 25


def test_best_of_three_leads_every_other() -> None:
    assert len(list(items(judgement(3, 2, 1), options=3))) == 1
    assert list(items(judgement(3, 3, 1), options=3)) == []
    (item,) = items(judgement(3, 2, 1, 1), options=4)
    assert item["check"]["labels"] == ["A", "B", "C", "D"]
    with pytest.raises(InputError, match="options=1"):
        list(items(judgement(3, 2), options=1))


@pytest.mark.parametrize("options", [2, 3])
def test_the_best_is_equally_often_each_label_whatever_its_place_in_the_file(options: int) -> None:
    for scores in ((3, 2, 1), (1, 2, 3)):
        made = [item for i in range(1500) for item in items(judgement(*scores[:options], source=f"Source {i}"), options=options)]
        counts = Counter(item["answer"] for item in made)
        assert len(counts) == options
        assert all(abs(count - 1500 / options) < 120 for count in counts.values())  # 5 deviations and more


def test_order_is_a_function_of_texts_and_seed() -> None:
    texts = [judgement(2, 1, source=f"Source {i}") for i in range(50)]
    runs = [[item["answer"] for j in texts for item in items(j, seed=seed)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_all_orders_put_the_best_at_every_label_and_the_reward_agrees() -> None:
    made = list(items(judgement(1, 3, 2), options=3, all_orders=True))
    assert [item["answer"] for item in made] == ["A", "B", "C"]
    assert len({item["prompt"] for item in made}) == 3
    for item in made:
        assert f"\n{item['answer']}: Text 1" in item["prompt"]
        assert [score(item, label) for label in "ABC"] == [float(label == item["answer"]) for label in "ABC"]
        assert (item["reward"], item["family"], item["locale"]) == ("preference", "preference_3", "de_DE")


def test_locale_of_a_translation_into_english_is_that_of_the_source() -> None:
    (item,) = items(Judgement("ja_JP", "en", "こんにちは", (("Hello", 1.0), ("Bye", 0.0))))
    assert item["locale"] == "ja_JP"
    assert "\nJapanese: こんにちは\n" in item["prompt"]


def test_a_reference_is_judged_better_than_its_damaged_copy() -> None:
    pair = Pair("de_DE", "Open the red door", "Öffne die rote Tür", "x")
    damaged = [against_damaged(pair, random.Random(seed)) for seed in range(5)]
    for j in damaged:
        (item,) = items(j)
        assert f"\n{item['answer']}: Öffne die rote Tür" in item["prompt"]
    assert any(a.translations != b.translations for a, b in pairwise(damaged))
    assert against_damaged(Pair("de_DE", "OK", "OK", "x"), random.Random(1)) is None
