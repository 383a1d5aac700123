"""Preference pairs and prompts with rewards: what a malformed line is told, what is left out, and in which order the rest comes."""

import json
import random
from pathlib import Path

import pytest

from megatron_tower.config import InputError, ParallelConfig
from megatron_tower.data import preferences, prompts, tokenizer
from megatron_tower.data.order import dealt
from megatron_tower.data.sequences import end_to_end, micro_batches
from tests.distributed.room import WORDS

PAIR = {
    "prompt": "say it",
    "chosen": "good words",
    "rejected": "bad words",
    "chosen_score": 1.0,
    "rejected_score": 0,
    "origin": "on_policy",
}
ITEM = {"prompt": "add 1 and 2", "reward": "maths", "family": "sum", "locale": "en", "answer": "3", "check": {"answer": "3"}}

BAD_PAIRS = {
    "missing": ({k: v for k, v in PAIR.items() if k != "rejected"}, '"rejected" must be a text'),
    "no text": (PAIR | {"prompt": "  "}, '"prompt" must be a text'),
    "equal": (PAIR | {"rejected": "good words"}, '"rejected" equals "chosen"'),
    "score": (PAIR | {"chosen_score": float("nan")}, '"chosen_score" is nan'),
    "list": ([PAIR], "a JSON list where an object is expected"),
}
BAD_ITEMS = {
    "no reward": ({k: v for k, v in ITEM.items() if k != "reward"}, '"reward" must be a text'),
    "unknown reward": (ITEM | {"reward": "beauty"}, '"reward" is beauty: use one of maths'),
    "no check": (ITEM | {"check": "3"}, '"check" must be an object'),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(1)
    lines = [" ".join(rng.choices(WORDS, k=9)) for _ in range(400)]
    lines += ["say it with good words or bad words", "add 1 and 2", "user model assistant", "abcdefghijklmnopqrstuvwxyz0123456789"] * 20
    return tokenizer.train(lines, "gemma2", 400, folder / "words")


def written(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("bad, said", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_malformed_pair_is_named_with_file_and_line(tmp_path: Path, bad: object, said: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: {said}"):
        preferences.read(written(tmp_path, PAIR, bad))


@pytest.mark.parametrize("bad, said", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_a_malformed_item_is_named_with_file_and_line(tmp_path: Path, bad: object, said: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: {said}"):
        prompts.read(written(tmp_path, ITEM, bad))


@pytest.mark.parametrize("read", [preferences.read, prompts.read])
def test_missing_empty_and_undecodable_files_are_refused(tmp_path: Path, read) -> None:
    with pytest.raises(InputError, match="is missing"):
        read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r":1: byte 12 is not UTF-8"):
        read(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{prompt}\n")
    with pytest.raises(InputError, match=r":1: not JSON"):
        read(tmp_path / "rows.jsonl")


def test_scores_and_origin_may_be_absent(tmp_path: Path) -> None:
    bare = {k: PAIR[k] for k in ("prompt", "chosen", "rejected")}
    assert preferences.read(written(tmp_path, bare, PAIR)) == [preferences.Preference(**bare), preferences.Preference(**PAIR)]


def test_pairs_that_are_too_long_are_left_out_and_told(tmp_path: Path, words, capsys) -> None:
    """Both answers must fit with their prompt: one that doesn't takes its pair with it."""
    path = written(tmp_path, PAIR, PAIR | {"rejected": "bad words " * 20})
    data = preferences.preferences(path, words, 40, seed=1)
    assert (data.rows_per_epoch, data.dropped) == (1, 1) and "1 of 2 pairs are longer than phase.seq_length=40" in capsys.readouterr().out
    with pytest.raises(InputError, match="in none of its 2 pairs"):
        preferences.preferences(path, words, 4, seed=1)


def test_prompts_that_are_too_long_are_left_out_and_told(tmp_path: Path, words, capsys) -> None:
    path = written(tmp_path, ITEM, ITEM | {"prompt": "add 1 and 2 " * 20})
    data = prompts.prompts(path, words, 40, seed=1)
    assert (data.rows_per_epoch, data.dropped) == (1, 1) and "1 of 2 prompts have more than 40 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of its 2 prompts leaves room"):
        prompts.prompts(path, words, 2, seed=1)


def test_a_pair_shares_its_prompt_and_counts_its_answers(tmp_path: Path, words) -> None:
    (chosen, rejected) = preferences.preferences(written(tmp_path, PAIR), words, 60, seed=1)[0]
    said = [words.decode([t for t, s in zip(*side, strict=True) if s], skip_special_tokens=True) for side in (chosen, rejected)]
    assert [text.strip() for text in said] == ["good words", "bad words"]
    start = chosen[1].index(1)
    assert chosen[0][:start] == rejected[0][:start] and chosen[1][start:] == [1] * (len(chosen[0]) - start)


def test_order_is_shuffled_complete_each_epoch_and_a_function_of_seed_and_index() -> None:
    first = [dealt(i, 10, seed=3) for i in range(30)]
    assert [sorted(first[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert first[:10] != first[10:20] and first[:10] != list(range(10))
    assert [dealt(i, 10, seed=3) for i in (25, 4, 13)] == [first[i] for i in (25, 4, 13)]
    assert [dealt(i, 10, seed=4) for i in range(30)] != first


def test_sequences_end_to_end_see_only_themselves() -> None:
    batch = end_to_end([([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])], pad_id=9, length=6)
    assert batch.tokens.tolist() == [[1, 2, 4, 9, 9, 9]] and batch.labels.tolist() == [[2, 3, 5, 9, 9, 9]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0, 0, 0]] and batch.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, 2]] and batch.count == 2
    assert batch.sums(batch.tokens).tolist() == [3, 4] and batch.spread(batch.sums(batch.tokens)).tolist() == [[3, 3, 4, 0, 0, 0]]


def test_micro_batches_are_padded_where_the_layout_asks_for_it() -> None:
    groups = [[([1, 2, 3, 4], [0, 1, 1, 1])], [([1, 2], [0, 1])], []]
    sizes = {
        "single": (ParallelConfig(name="single"), [3, 1, 1]),
        "stages exchange one shape": (ParallelConfig(name="pp2", pipeline=2), [3, 3, 3]),
        "a row is divided": (ParallelConfig(name="sp", tensor=2, sequence_parallel=True), [4, 2, 2]),
    }
    for name, (parallel, expected) in sizes.items():
        assert [batch.tokens.numel() for batch in micro_batches(groups, 0, parallel)] == expected, name
