"""Planted pieces of evaluation sets are found, in any script, and what only sounds like them is not."""

import json
from pathlib import Path

import pytest

from megatron_tower.config import InputError
from megatron_tower.curation.contamination import Contamination, texts_of

LONG = "The committee will meet again on the ninth of March to discuss the budget of the northern harbour and its cranes."
SHORT = "Seven ships left the harbour"
LABEL = "Save page"
CHINESE = "委员会将于三月九日再次开会讨论北港的预算以及起重机的维修问题并决定明年的计划"
SET = [LONG, SHORT, LABEL, CHINESE]


@pytest.fixture(scope="module")
def found() -> Contamination:
    return Contamination(SET, 13)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"Before it. {LONG} After it.", {0}),
        ("he said: WILL MEET AGAIN ON THE NINTH, of March -- to discuss the budget of", {0}),  # 13 words
        ("will meet again on the ninth of March to discuss the budget", set()),  # 12 words
        (f"Then {SHORT.lower()} at noon", {1}),
        ("Seven ships left a harbour", set()),
        ("Title\nSave  Page\nmore", {2}),
        ("You can save page after page", set()),
        (f"新闻：{CHINESE}。完", {3}),
        (CHINESE[:20] + "以及别的事情", set()),
        (f"{LONG}\n{SHORT}", {0, 1}),
        ("", set()),
    ],
)
def test_among(found: Contamination, text: str, told: set[int]) -> None:
    assert found.among(text) == told


def test_several_texts_at_once(found: Contamination) -> None:
    assert found.among(SHORT, CHINESE) == {1, 3}


def test_nothing_to_look_for() -> None:
    assert Contamination([], 13).among(LONG) == set()


def test_texts_of_an_evaluation_set(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    rows = [{"id": 3, "source": "a", "kwargs": [{"word": "b"}, None]}, {"messages": [{"role": "user", "content": "c"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(path, "sft.decontaminate") == ["a", "b", "user", "c"]


@pytest.mark.parametrize("content", ["{", "id\tsource\n1\tA sentence\n", '["a"]\n'])
def test_what_is_no_evaluation_set(tmp_path: Path, content: str) -> None:
    path = tmp_path / "set.jsonl"
    with pytest.raises(InputError, match=r"set.jsonl is missing: name evaluation sets in sft.decontaminate"):
        texts_of(path, "sft.decontaminate")
    path.write_text(content)
    with pytest.raises(InputError, match=r'set.jsonl:1: .*must be one object like {"source": "..."}, with any fields .sft.decontaminate.$'):
        texts_of(path, "sft.decontaminate")


def test_labels_and_numbers_are_no_texts(tmp_path: Path) -> None:
    """What ten rows say alike, where it is short; a context that ten questions share is looked for."""
    rows = [{"domain": "news", "context": LONG, "question": f"Who {i}?", "answer": str(i), "turns": [{"role": "user"}]} for i in range(10)]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(path, "") == [text for i in range(10) for text in (LONG, f"Who {i}?")]
