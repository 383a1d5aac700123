"""What a policy might try instead of answering gets no positive advantage, whatever its group holds beside it."""

import random

import pytest

from megatron_tower.data import cldr, instructions, judgements, rl, verifiable
from megatron_tower.data.pair import Pair
from megatron_tower.rewards import reward
from megatron_tower.rollout.experience import group_advantages

CONSTANTS = ("OK", "42", "Sure! Here is the translation:", '{"translation": ""}', "A B", "the the the the")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [pair for code in ("de_DE", "fr_FR", "ja_JP", "ru_RU") for pair in cldr.generate(code, ["date", "money", "unit"], 60, seed=1)]


def advantages(item: dict, answers: list[str]) -> list[float]:
    score = reward(item["reward"])
    return group_advantages([score(item, answer) for answer in answers], standardised=True)


def test_of_translations(pairs) -> None:
    """A group of the reference, near misses and one hack: the hack is never above the mean. Nor does it earn anything over all items:
    a number may by chance share a digit or two with one of them.
    """
    items = verifiable.generate(pairs, 150, seed=2)
    assert len(items) == 150
    earned: dict[str, list[float]] = {}
    for item in items:
        damaged = verifiable.damaged(item, random.Random(3))
        honest = [item["answer"], damaged["truncated"], damaged["preamble"], damaged["inline_note"]]
        source = item["check"]["source"]
        for name, hack in {**{c: c for c in CONSTANTS}, "source": source, "shouted": source.upper(), "empty": ""}.items():
            assert advantages(item, [*honest, hack])[-1] <= 0, f"{hack!r} pays for {item['prompt']!r}"
            earned.setdefault(name, []).append(reward("translation")(item, hack))
    assert {name: sum(scores) / len(scores) for name, scores in earned.items() if sum(scores) / len(scores) >= 0.01} == {}


def test_of_maths_and_instructions() -> None:
    for kinds, make in ((rl.MATHS, rl._maths), (rl.INSTRUCTIONS, rl._instructions)):
        for example in instructions.generate(list(kinds), 60, seed=1, held_out=False, share=0.05):
            item = make(example)
            for hack in ("", "Sure, I can help with that.", " ".join(map(str, range(50)))):
                found = advantages(item, [example.answer, "", hack])
                assert found[0] > 0 >= found[2], f"{hack!r} pays for {item['prompt']!r}"


def test_of_preferences_a_constant_choice_earns_what_chance_does(pairs) -> None:
    """Over both orders of each question a constant answer is right half of the time, and naming both or none never is."""
    score = reward("preference")
    earned = {answer: [] for answer in ("A", "B", "A B", "", "both", "A and B are equal")}
    for pair in pairs[:100]:
        if judgement := judgements.against_damaged(pair, random.Random(1)):
            for item in judgements.items(judgement, all_orders=True):
                for answer, scores in earned.items():
                    scores.append(score(item, answer))
    means = {answer: sum(scores) / len(scores) for answer, scores in earned.items()}
    assert means == {"A": 0.5, "B": 0.5, "A B": 0, "": 0, "both": 0, "A and B are equal": 0}
