"""Choosing best and worst, and reading answers, pairs and post-edits that were made elsewhere."""

import json
from pathlib import Path

import pytest

from megatron_tower.config import InputError, PairsConfig
from megatron_tower.data.preferences import Preference
from megatron_tower.rollout import scorers
from megatron_tower.rollout.pairs import Candidate, best_and_worst, read_answers, read_given, read_items


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


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_chats_of_sft_are_items_with_their_answer(tmp_path: Path):
    rows = [{"messages": turns("p", "a"), "task": "x"}, {"messages": turns("p", "a", "q", "b")}, {"messages": turns("q", "b")}]
    items, several = read_items(write(tmp_path / "train.jsonl", *rows))
    assert items == [{"prompt": "p", "answer": "a", "check": {}}, {"prompt": "q", "answer": "b", "check": {}}] and several == 1
    with pytest.raises(InputError, match=r"none of its 1 chats is a user turn and its answer"):
        read_items(write(tmp_path / "long.jsonl", rows[1]))
    with pytest.raises(InputError, match=r"mixed\.jsonl:2: no messages with role and content"):
        read_items(write(tmp_path / "mixed.jsonl", rows[0], {"prompt": "p"}))
    with pytest.raises(InputError, match=r'bad\.jsonl:1: "reward" must be a text'):
        read_items(write(tmp_path / "bad.jsonl", {"prompt": "p"}))
    with pytest.raises(InputError, match=r"which have no reward: set pairs\.scorer=reward_model"):
        scorers.check(PairsConfig(name="x", scorer="rewards"), items)


PUBLISHED = {
    "prompt": "p",
    "prompt_id": "0ab1",
    "chosen": turns("p", "good"),
    "rejected": turns("p", "bad"),
    "messages": turns("p", "good"),
    "score_chosen": 8.0,
    "score_rejected": 4.5,
}


@pytest.mark.parametrize(
    "row",
    [
        PUBLISHED,
        {name: value for name, value in PUBLISHED.items() if name != "prompt"},
        PUBLISHED | {"prompt": turns("p"), "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]},
        {"prompt": "p", "chosen": "good", "rejected": "bad", "chosen_score": 8.0, "rejected_score": 4.5, "origin": "off_policy"},
    ],
    ids=["ultrafeedback", "no prompt", "prompt as a chat", "texts"],
)
def test_pairs_come_as_texts_or_as_chats(row: dict, tmp_path: Path):
    assert read_given(write(tmp_path / "given.jsonl", row)) == ([Preference("p", "good", "bad", 8.0, 4.5, "off_policy")], 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chosen": turns("p", "good", "q", "better")}, '"chosen" has several turns'),
        ({"rejected": turns("q", "bad")}, "don't begin with the same prompt"),
        ({"prompt": "q"}, "don't begin with the same prompt"),
        ({"rejected": "bad"}, '"rejected": no messages with role and content'),
        ({"rejected": turns("p", "good")}, '"rejected" equals "chosen"'),
        ({"rejected": turns("p")}, "the assistant last"),
        ({"score_chosen": "high"}, '"chosen_score" is high'),
    ],
)
def test_a_bad_pair_of_chats_is_named(change: dict, told: str, tmp_path: Path):
    with pytest.raises(InputError, match=rf"given\.jsonl:2: .*{told}|given\.jsonl:2: {told}"):
        read_given(write(tmp_path / "given.jsonl", PUBLISHED, PUBLISHED | change))
