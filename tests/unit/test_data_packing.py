"""Rows for training: what lies in them, in which order, and that nothing of one document or example reaches another."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_tower import command
from megatron_tower.config import Config, InputError
from megatron_tower.data import chat, corpora, manifest, packing, tokenizer
from megatron_tower.data.batch import Batch
from megatron_tower.data.build import BlendedDocuments, training_dataset

SEQ = 64


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> "tokenizer.PreTrainedTokenizerFast":
    return tokenizer.train([f"question {i} answer word number" for i in range(200)], "gemma2", 300, tmp_path_factory.mktemp("words"))


def chats(count: int) -> list[list[dict[str, str]]]:
    ask = lambda i: "number " * (i % 5) + f"question {i}"  # noqa: E731
    return [[{"role": "user", "content": ask(i)}, {"role": "assistant", "content": f"answer {i}"}] for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path, words: "tokenizer.PreTrainedTokenizerFast") -> Path:
    """A prepared folder in small: three CPT parts of very different sizes, and chats."""
    folder = tmp_path / "data"
    words.save_pretrained(folder / "tokenizer")
    (folder / "cpt").mkdir()
    blend = []
    for name, share, count in (("monolingual", 0.66, 300), ("parallel", 0.33, 90), ("instruction", 0.01, 30)):
        documents = [f"{name} word {i} " + "number " * (i % 9) for i in range(count)]
        blend.append({"prefix": name, "share": share, "tokens": corpora.write(folder / "cpt" / name, documents, words)})
    (folder / "cpt" / "blend.json").write_text(json.dumps(blend))
    (folder / "sft").mkdir()
    (folder / "sft" / "train.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats(40)))
    manifest.write(folder, {"vocab_size": len(words)})
    return folder


def run(folder: Path, phase: str, *more: str) -> Config:
    words = [
        f"data.folder={folder}",
        f"phase={phase}",
        f"phase.seq_length={SEQ}",
        "phase.epochs=null",
        "phase.train_steps=1",
        "data.vocab_size=300",
    ]
    return command.load([*words, *more])


def segments(row: Batch) -> list[tuple[torch.Tensor, ...]]:
    """(tokens, labels, loss mask, positions) of each segment of a row."""
    cuts = row.cu_seqlens.tolist()
    assert cuts[0] == 0 and cuts[-1] == row.tokens.numel() and all(a < b for a, b in itertools.pairwise(cuts))
    fields = (row.tokens, row.labels, row.loss_mask, row.position_ids)
    return [tuple(f[0, a:b] for f in fields) for a, b in itertools.pairwise(cuts)]


def test_packing_takes_each_example_once_an_epoch_and_fills_rows() -> None:
    lengths = [(i * 37) % 50 + 5 for i in range(500)]
    for epoch in range(3):
        rows = packing.pack(lengths, SEQ, seed=1, epoch=epoch)
        assert sorted(i for row in rows for i in row) == list(range(500))
        assert all(sum(lengths[i] for i in row) <= SEQ for row in rows)
        assert sum(lengths) > 0.93 * SEQ * len(rows)
    assert packing.pack(lengths, SEQ, 1, 0) == packing.pack(lengths, SEQ, 1, 0)
    together = [{frozenset(row) for row in packing.pack(lengths, SEQ, seed, epoch)} for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len(together[0] & together[1]) < 20 and len(together[0] & together[2]) < 20  # other neighbours each epoch, for each seed


def test_sft_rows_hold_whole_examples_with_loss_on_answers_only(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    dataset = training_dataset(run(folder, "sft"), words, num_rows=1000)
    expected = Counter()
    for messages in chats(40):
        ids, said = chat.encode(words, messages)
        expected[(tuple(ids[:-1]), tuple(ids[1:]), tuple(said[1:]))] += 1
    found = Counter()
    for index in range(dataset.rows_per_epoch):
        row = dataset[index]
        assert row.tokens.shape == (1, SEQ) and row.cu_seqlens.dtype == torch.int32
        for tokens, labels, mask, positions in segments(row):
            assert positions.tolist() == list(range(len(tokens)))
            if mask.sum() == 0:
                assert set(tokens.tolist()) == {words.pad_token_id} and row.tokens[0, -1] == words.pad_token_id
            else:
                found[(tuple(tokens.tolist()), tuple(labels.tolist()), tuple(mask.int().tolist()))] += 1
    assert found == expected


def test_each_epoch_is_complete_though_rows_run_on(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    dataset = training_dataset(run(folder, "sft"), words, num_rows=10_000)
    index = 0
    for epoch in range(3):
        taken: list[int] = []
        while len(taken) < 40:
            taken += dataset.row(index)
            index += 1
        assert sorted(taken) == list(range(40)), epoch


def test_examples_that_are_too_long_are_counted_and_said(
    tmp_path: Path, words: "tokenizer.PreTrainedTokenizerFast", capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    long = [{"role": "user", "content": "number " * 100}, {"role": "assistant", "content": "answer"}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in [long, *chats(3)]))
    assert packing.packed_chats(path, words, SEQ, 1, 10).dropped == 1
    assert f"{path}: 1 of 4 examples are longer than phase.seq_length=64" in capsys.readouterr().out
    path.write_text(json.dumps({"messages": long}) + "\n")
    with pytest.raises(InputError, match="none of its 1 examples fits"):
        packing.packed_chats(path, words, SEQ, 1, 10)


@pytest.mark.parametrize("phase", ["cpt", "sft"])
def test_order_is_a_function_of_seed_and_index_alone(folder: Path, words: "tokenizer.PreTrainedTokenizerFast", phase: str) -> None:
    short, long = (training_dataset(run(folder, phase), words, num_rows=n) for n in (50, 400))
    other = training_dataset(run(folder, phase, "seed=7"), words, num_rows=50)
    backwards = {i: long[i] for i in reversed(range(50))}  # asked in another order, in a longer run
    for i in range(50):
        assert all(
            torch.equal(getattr(short[i], f), getattr(backwards[i], f))
            for f in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")
        )
    assert any(not torch.equal(short[i].tokens, other[i].tokens) for i in range(50))
    assert len(short) == 50
    with pytest.raises(IndexError):
        short[50]


def test_cpt_shares_hold_by_tokens_within_one_percent(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    dataset = training_dataset(run(folder, "cpt"), words, num_rows=2000)
    rows = Counter(int(part) for part in dataset.blended.dataset_index)
    for part, share in enumerate((0.66, 0.33, 0.01)):
        assert abs(rows[part] / 2000 - share) < 0.01 * max(share, 0.1)
    sources = [words.decode(dataset[i].tokens[0]) for i in range(0, 300)]
    mostly = Counter(max(("monolingual", "parallel", "instruction"), key=text.count) for text in sources)
    assert abs(mostly["monolingual"] / 300 - 0.66) < 0.02


def test_cpt_rows_are_cut_at_every_document_end(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    dataset = training_dataset(run(folder, "cpt"), words, num_rows=100)
    several = 0
    for index in range(100):
        parts = segments(dataset[index])
        several += len(parts) > 1
        for number, (tokens, labels, mask, positions) in enumerate(parts):
            assert positions.tolist() == list(range(len(tokens)))
            assert words.eos_token_id not in tokens[:-1].tolist()
            assert number == 0 or tokens[0] == words.bos_token_id
            assert torch.equal(tokens[1:], labels[:-1])
            ends = bool(tokens[-1] == words.eos_token_id)
            assert ends or number == len(parts) - 1
            assert mask.tolist() == [1.0] * (len(tokens) - ends) + [0.0] * ends  # the next document's start is nobody's to predict
    assert several > 50


def test_every_document_is_seen_in_an_epoch_and_none_twice(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    only = [{"prefix": "monolingual", "share": 1.0, "tokens": 0}]
    (folder / "cpt" / "blend.json").write_text(json.dumps(only))
    dataset = BlendedDocuments(folder / "cpt", words.eos_token_id, SEQ, 1, 2000)
    for epoch in range(2):
        rows = range(epoch * dataset.rows_per_epoch, (epoch + 1) * dataset.rows_per_epoch)
        texts = [words.decode(tokens) for i in rows for tokens, *_ in segments(dataset[i])]
        starts = Counter(found.group(1) for text in texts if (found := re.match(r"<bos>monolingual word (\d+)[ <]", text)))
        assert max(starts.values()) == 1
        assert len(starts) > 200  # of 300; a start that a row's end cuts short is not counted


def test_qwen_end_of_text_is_learnt_though_it_is_also_the_padding(tmp_path: Path) -> None:
    words = tokenizer.train([f"question {i} answer word number" for i in range(200)], "qwen2", 300, tmp_path / "words")
    corpora.write(tmp_path / "part", [f"word {i}" for i in range(50)], words)
    (tmp_path / "blend.json").write_text(json.dumps([{"prefix": "part", "share": 1.0, "tokens": 0}]))
    row = BlendedDocuments(tmp_path, words.eos_token_id, SEQ, 1, 5)[0]
    ends = row.labels[0] == words.eos_token_id
    assert ends.sum() > 2 and row.loss_mask[0][ends].all()


def test_a_batch_of_rows_keeps_its_boundaries(folder: Path, words: "tokenizer.PreTrainedTokenizerFast") -> None:
    dataset = training_dataset(run(folder, "sft"), words, num_rows=8)
    batch = Batch.stack([dataset[i] for i in range(4)])
    assert batch.tokens.shape == (4, SEQ)
    assert set(range(0, 4 * SEQ + 1, SEQ)) <= set(batch.cu_seqlens.tolist())


BROKEN = {
    "not JSON": ("{oops}", "not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "no messages": ('{"text": "hi"}', "no messages"),
    "not an object": ("[1]", "a JSON list"),
    "question without answer": ('{"messages": [{"role": "user", "content": "hi"}]}', "take turns"),
    "wrong order": ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "take turns"),
    "no text": ('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}', "assistant turn has no text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_line_is_named_with_file_and_number(tmp_path: Path, name: str) -> None:
    line, said = BROKEN[name]
    path = tmp_path / "train.jsonl"
    good = json.dumps({"messages": chats(1)[0]}).encode()
    path.write_bytes(good + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(InputError, match=said) as error:
        packing.read_chats(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"train\.jsonl is empty"):
        packing.read_chats(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"nowhere\.jsonl is missing"):
        packing.read_chats(tmp_path / "nowhere.jsonl")


def flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated or changed"),
    "missing": (lambda p: p.unlink(), "is missing"),
    "flipped": (flip, "sha256 differs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["cpt/parallel.bin", "cpt/monolingual.idx", "sft/train.jsonl", "tokenizer/tokenizer.json"])
def test_damaged_folder_is_refused_by_name(folder: Path, words: "tokenizer.PreTrainedTokenizerFast", file: str, damage: str) -> None:
    spoil, said = DAMAGE[damage]
    spoil(folder / file)
    with pytest.raises(InputError, match=said) as error:
        training_dataset(run(folder, "cpt"), words, 10)
    assert str(folder / file) in str(error.value)


def test_manifest_itself_is_checked(folder: Path) -> None:
    written = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(written.replace('"vocab_size": 300', '"vocab_size": 301'))
    with pytest.raises(InputError, match=r"manifest\.json was changed after it was written"):
        manifest.verify(folder)
    (folder / "manifest.json").write_text('{"files"')
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        manifest.verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds no manifest\.json: run python -m tools\.prepare_data"):
        manifest.verify(folder)


def test_other_tokenizer_and_too_little_text_are_refused(folder: Path, words: "tokenizer.PreTrainedTokenizerFast", tmp_path: Path) -> None:
    other = tokenizer.train([f"question {i} answer word number" for i in range(200)], "gemma2", 299, tmp_path / "other")
    with pytest.raises(InputError, match="tokenized with 300 entries, the model's tokenizer has 299"):
        training_dataset(run(folder, "cpt"), other, 10)
    with pytest.raises(InputError, match=r"instruction\.bin holds \d+ tokens, less than one row"):
        training_dataset(run(folder, "cpt", "phase.seq_length=1024"), words, 10)
