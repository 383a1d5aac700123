"""The preference reward: which answers are a clear verdict, and that hedging, silence and naming all labels earn nothing."""

import re

import pytest

from megatron_tower.config import InputError
from megatron_tower.rewards.preference import choice, score

ITEM = {"prompt": "", "reward": "preference", "check": {"best": "B", "labels": ["A", "B"]}}

# fmt: off
CLEAR = [
    "B", "b)", "**B**", "(B)", '"B"', "_B_", "B.", "B!", "Option B", "option b", "Translation B.", "B\n\nA leaves out the number.", "B\nB",
    "Answer: B", "answer: b", "Final answer: **B**", "**Answer:** B", "The answer is B.", r"\boxed{B}", "My pick: B", "Translation: B",
    "Translation B is better", "Translation **B** is better", "B is better than A.", "B is clearly the better translation.", "B wins",
    "B is superior", "B is a bit better than A", "A is good, but B is better.", "A is bad, and B is better.",
    "B is better than A because A is worse", "The better translation is B because A drops the date.", "The better translation is 'B'.",
    "The better translation is B, A is wrong.", "The best translation is **B**.", "A better translation is B.", "Better translation: B",
    "The winner is B", "B because A is wrong", "I prefer B.", "I would choose translation B over A.", "I'd go with B",
    "Which translation is better, A or B?\nB", '{"better": "B"}', '{"Best": "Translation B", "why": "A is shorter"}',
    '```json\n{"better": "B", "reason": "A is bad"}\n```',
]
UNCLEAR = [
    "", " \n", "A and B", "A, B", "A B", "A\nB", "A / B", "A/B", "a or b", "Both", "Neither.", "Both A and B are better",
    "A or B is better", "A and B is better", "A is worse than B", "B is worse than A", "worse: B", "Worst: B", "B is not better",
    "B isn't better", "I don't think B is better.", "It is not true that B is better", "Neither A nor B is better.",
    "If B is better, I say so.", "Not better: B", "Is B better?", "B is better?", "Which translation is better, A or B?",
    "The better translation is not B", "The better translation is A or B", "A is better. No, B is better.", "A is better or B is better",
    "A is better than nothing; B is best", "A\n\nOn second thought: B", "Answer: A, B", "Answer: A/B", "The answer is A and B",
    "Answer: A\nAnswer: B", "Answer: neither A nor B", "A: Das Haus\nB: Die Haus", "A. Das Haus. B. Die Haus.", "C", "AB", "ABABAB", "B B",
    "Bach", "Ich denke B", "1", "{}", "[1]", '{"better": 2}', '{"better": "A and B"}', '{"better": "A", "best": "B"}', '{"reason": "B"}',
]
MALFORMED = [
    None, {}, {"best": "C", "labels": ["A", "B"]}, {"best": "A", "labels": ["A"]}, {"best": "A", "labels": ["A", "b"]},
    {"best": "A", "labels": ["A", 2]}, {"best": 1, "labels": "AB"},
]
# fmt: on
SWAP = {"A": "B", "B": "A", "a": "b", "b": "a"}


@pytest.mark.parametrize("answer", CLEAR)
def test_a_clear_verdict_is_understood_and_so_is_its_opposite(answer: str) -> None:
    assert score(ITEM, answer) == 1.0
    if " a " not in answer:  # the article
        swapped = re.sub("(?<![a-zA-Z])[ABab](?![a-zA-Z])", lambda found: SWAP[found[0]], answer)
        assert choice(swapped, ["A", "B"]) == "A"


@pytest.mark.parametrize("answer", UNCLEAR)
def test_no_clear_verdict_earns_nothing_whichever_is_best(answer: str) -> None:
    assert choice(answer, ["A", "B"]) is None
    assert score(ITEM, answer) == 0.0


def test_the_wrong_verdict_earns_nothing() -> None:
    assert [score(ITEM, answer) for answer in ("A", "A is better than B", '{"better": "A"}')] == [0.0] * 3


def test_more_than_two_labels() -> None:
    labels = ["A", "B", "C"]
    assert choice("The best translation is C.", labels) == "C"
    assert choice("A and B are fine but C is the best", labels) is None  # says less than it seems to: "A and B" is no verdict on either
    assert choice("C", labels) == "C"
    assert choice("A, B, C", labels) is None
    assert choice("A\nB\nC", labels) is None


@pytest.mark.parametrize("check", MALFORMED)
def test_malformed_items_are_refused(check: object) -> None:
    with pytest.raises(InputError, match="a preference item needs check"):
        score({"check": check}, "A")
