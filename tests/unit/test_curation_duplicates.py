"""What repeats goes, once; what does not stays: exact and near copies planted among rows that are only of one kind."""

import random

import numpy as np
import pytest

from megatron_tower.curation import duplicates

WORDS = [f"w{i}" for i in range(5000)]


def document(rng: random.Random, words: int = 200) -> list[str]:
    return rng.choices(WORDS, k=words)


def why(texts: list[str], near: bool = True) -> list[str]:
    columns = np.array([duplicates.of_document({"text": text}, near) for text in texts], dtype=np.uint64).T
    codes, reasons = duplicates.alike(list(columns), duplicates.document_columns(near))
    return [reasons[code - 1] if code else "" for code in codes]


def test_a_copy_goes_whatever_its_case_and_spaces() -> None:
    texts = ["One  text.", "Another one", "one TEXT.", "ｏｎｅ text."]
    assert why(texts) == ["", "", "repeated", "repeated"] == why(texts, near=False)


def test_near_copies_are_found_and_others_stay() -> None:
    """Of 200 planted copies with 3 of 100 words changed nearly all; of 400 unrelated texts none."""
    rng = random.Random(1)
    originals = [document(rng) for _ in range(400)]
    copies = [[*(rng.choice(WORDS) if rng.random() < 0.02 else word for word in text), "changed"] for text in originals[:200]]
    found = why([" ".join(text) for text in originals + copies])
    assert set(found[:400]) == {""}
    assert sum(reason == "near_duplicate" for reason in found[400:]) > 170  # similarity about 0.82
    assert why([" ".join(text) for text in originals + copies], near=False)[400:] == [""] * 200


def test_the_first_of_a_chain_stays() -> None:
    rng = random.Random(2)
    chain = [document(rng, 300)]
    for _ in range(4):
        chain.append(["changed" if rng.random() < 0.01 else word for word in chain[-1]])
    assert why([" ".join(text) for text in chain])[0] == "" and set(why([" ".join(text) for text in chain])[1:]) == {"near_duplicate"}


@pytest.mark.parametrize("text", ["", "...", "one", "a few words"])
def test_texts_of_few_words_are_like_their_copies_alone(text: str) -> None:
    assert why([text, text + "!?", text], near=True)[2] == "repeated"
    assert why([text, "something else"]) == ["", ""]


def test_texts_without_spaces_have_words_too() -> None:
    text = "".join(chr(0x4E00 + i * 7) for i in range(300))
    assert why([text, text[:150] + "変" + text[151:]]) == ["", "near_duplicate"]


def test_sides_of_pairs() -> None:
    def pair(source: str, target: str, to: str = "de_DE") -> dict:
        return {"source_locale": "en", "target_locale": to, "source": source, "target": target}

    rows = [pair("a", "x"), pair("a", "y"), pair("b", "x"), pair("c", "y"), pair("A", "X"), pair("a", "x", "fr_FR")]

    def reasons(sides: list[str]) -> list[str]:
        columns = np.array([duplicates.of_pair(row, sides) for row in rows], dtype=np.uint64).T
        codes, names = duplicates.alike(list(columns), duplicates.pair_columns(sides))
        return [names[code - 1] if code else "" for code in codes]

    assert reasons([]) == ["", "", "", "", "repeated", ""]
    assert reasons(["source"]) == ["", "repeated_source", "", "", "repeated", ""]
    # ("c", "y") stays: the row whose target it repeats has gone
    assert reasons(["source", "target"]) == ["", "repeated_source", "repeated_target", "", "repeated", ""]


def test_no_rows() -> None:
    assert len(duplicates.alike([np.zeros(0, dtype=np.uint64)] * 15, duplicates.document_columns(True))[0]) == 0
