"""Choosing best and worst, and reading answers, pairs and post-edits that were made elsewhere."""

import json
from pathlib import Path

import pytest

from megatron_tower.config import InputError
from megatron_tower.data.preferences import Preference
from megatron_tower.rollout.pairs import Candidate, best_and_worst, read_answers, read_given


def scored(*answers: tuple[str, float], sampled: bool = True) -> list[Candidate]:
    return [Candidate(answer, sampled, score) for answer, score in answers]


def test_of_ties_the_shortest_best_and_the_worst_closest_in_length():
    candidates = scored(("good and long", 1.0), ("good", 1.0), ("middling", 0.5), ("bad, very long", 0.0), ("bad !", 0.0), ("b", 0.0))
    assert best_and_worst("p", candidates, 0.0) == Preference("p", "good", "bad !", 1.0, 0.0, "on_policy")
    assert best_and_worst("p", candidates[::-1], 0.0) == Preference("p", "good", "bad !", 1.0, 0.0, "on_policy")


def test_a_pair_is_on_policy_when_both_sides_were_sampled():
    good, bad, given = scored(("good", 0.9))[0], scored(("bad", 0.1))[0], scored(("given", 1.0), sampled=False)[0]
    worst = Candidate("worst given", False, 0.0)
    assert best_and_worst("p", [good, bad], 0.0).origin == "on_policy"
    assert best_and_worst("p", [good, bad, given], 0.0).origin == "off_policy"
    assert best_and_worst("p", [good, bad, worst], 0.0).origin == "off_policy"


@pytest.mark.parametrize(
    ("scores", "gap", "made"),
    [((0.5, 0.5), 0.0, False), ((0.5, 0.4), 0.0, True), ((0.75, 0.5), 0.25, False), ((0.76, 0.5), 0.25, True), ((-3.0, 2.0), 4.0, True)],
)
def test_scores_as_close_as_the_gap_make_no_pair(scores: tuple[float, float], gap: float, made: bool):
    pair = best_and_worst("p", scored(*zip("ab", scores, strict=True)), gap)
    assert (pair is not None) == made
    assert not made or pair.chosen_score - pair.rejected_score == max(scores) - min(scores)


def test_less_than_two_answers_make_no_pair():
    assert best_and_worst("p", [], 0.0) is None
    assert best_and_worst("p", scored(("only", 1.0)), 0.0) is None


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


EDIT = {"source": "Good morning", "mt": "Gut Morgen", "post_edit": "Guten Morgen", "source_locale": "en", "target_locale": "de_DE"}


def test_a_post_edit_is_chosen_over_what_it_mends(tmp_path: Path):
    pairs, unchanged = read_given(write(tmp_path / "edits.jsonl", EDIT, EDIT | {"mt": "Guten Morgen "}, "", EDIT | {"mt": "Morgen"}))
    prompt = "Translate the following English source text to German:\nEnglish: Good morning\nGerman: "
    assert unchanged == 1 and [pair.rejected for pair in pairs] == ["Gut Morgen", "Morgen"]
    assert pairs[0] == Preference(prompt, "Guten Morgen", "Gut Morgen", None, None, "post_edit")


def test_ready_pairs_are_taken_as_they_are(tmp_path: Path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 0.5, "rejected_score": None, "origin": "annotators"}
    assert read_given(write(tmp_path / "pairs.jsonl", row)) == ([Preference("p", "a", "b", 0.5, None, "annotators")], 0)


def test_answers_of_one_prompt_come_together(tmp_path: Path):
    path = write(
        tmp_path / "answers.jsonl", {"prompt": "p", "answers": ["a"]}, {"prompt": "q", "answers": []}, {"prompt": "p", "answers": ["b"]}
    )
    assert read_answers(path) == {"p": ["a", "b"], "q": []}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", ":2: not JSON"),
        ([1], ":2: a JSON list"),
        ({"prompt": "", "answers": []}, ':2: "prompt"'),
        ({"prompt": "p"}, ':2: "answers"'),
        ({"prompt": "p", "answers": ["a", 3]}, ':2: "answers"'),
    ],
)
def test_a_malformed_answer_is_named(tmp_path: Path, row: object, told: str):
    with pytest.raises(InputError, match=rf"answers\.jsonl{told}"):
        read_answers(write(tmp_path / "answers.jsonl", {"prompt": "p", "answers": ["a"]}, row))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({name: text for name, text in EDIT.items() if name != "mt"}, ':2: "mt"'),
        (EDIT | {"post_edit": "  "}, ':2: "post_edit"'),
        (EDIT | {"target_locale": "xx_XX"}, ":2: locale xx_XX is unknown"),
    ],
)
def test_a_malformed_post_edit_is_named(tmp_path: Path, row: dict, told: str):
    with pytest.raises(InputError, match=rf"edits\.jsonl{told}"):
        read_given(write(tmp_path / "edits.jsonl", EDIT, row))


def test_missing_and_empty_files_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl is missing"):
        read_answers(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        read_given(write(tmp_path / "empty.jsonl"))
