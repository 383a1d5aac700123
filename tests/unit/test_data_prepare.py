"""The data step on the demo's real text: nothing leaks, the same bytes each time, finished folders are kept, bad settings refused."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_tower import command, config
from megatron_tower.config import Config, InputError
from megatron_tower.data import cldr, corpora, examples, instructions, manifest, tasks, tokenizer
from megatron_tower.data.damage import damage
from megatron_tower.data.pair import Pair, key
from megatron_tower.data.prepare import prepare
from megatron_tower.data.split import HeldOut, split, words
from megatron_tower.data.templates import PARALLEL


def demo(folder: Path, *more: str) -> Config:
    return command.load([f"data.folder={folder}", *more])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data folder; its wheels come from the user's cache or the network."""
    return prepare(demo(tmp_path_factory.mktemp("demo") / "data"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_lines(folder: Path) -> list[str]:
    """Every line of text that a phase trains on, as the model gets it: decoded from the corpora, and the chats."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    decode = tokenizer.load(folder / "tokenizer")
    lines = []
    for part in ("monolingual", "parallel", "instruction"):
        corpus = IndexedDataset(str(folder / "cpt" / part))
        lines += "\n".join(decode.batch_decode(corpus[:], skip_special_tokens=True)).split("\n")
    for row in rows(folder / "sft" / "train.jsonl"):
        lines += [line for message in row["messages"] for line in message["content"].split("\n")]
    for item in rows(folder / "rl" / "train.jsonl"):
        lines += [*item["prompt"].split("\n"), *(item["answer"] or "").split("\n")]
    for pair in rows(folder / "preferences" / "train.jsonl"):
        lines += [*pair["prompt"].split("\n"), *pair["chosen"].split("\n"), *pair["rejected"].split("\n")]
    return lines


def test_no_held_out_string_is_trained_on(prepared: Path) -> None:
    """Neither as a line (bare or after its label) nor, from three words on, anywhere inside one."""
    held = {row[side] for row in rows(prepared / "held_out" / "translation.jsonl") for side in ("source", "reference")}
    held |= {line for row in rows(prepared / "held_out" / "text.jsonl") for line in row["text"].split("\n")}
    held |= {row["chosen"] for row in rows(prepared / "held_out" / "preference.jsonl")}
    questions = {row["prompt"] for row in rows(prepared / "held_out" / "general.jsonl")}
    assert len(held) > 1500 and len(questions) == 1000
    asked = {row["prompt"] for row in rows(prepared / "held_out" / "verifiable.jsonl")}
    assert len(asked) > 500 and not asked & {row["prompt"] for row in rows(prepared / "rl" / "train.jsonl")}

    lines = training_lines(prepared)
    assert len(lines) > 100_000
    seen = {key(line) for line in lines} | {key(line.split(": ", 1)[1]) for line in lines if ": " in line}
    assert not {text for text in held | questions if key(text) in seen}

    wanted = {f" {' '.join(run)} " for text in held if len(run := words(text)) >= 3}
    lengths = {text.count(" ") - 1 for text in wanted}
    for line in dict.fromkeys(lines):
        run = words(line)
        inside = {f" {' '.join(run[i : i + n])} " for n in lengths if n <= len(run) for i in range(len(run) - n + 1)}
        assert not wanted & inside, line


def test_every_part_and_split_has_its_share(prepared: Path) -> None:
    facts = manifest.verify(prepared)
    assert {s["name"]: s["licence"] for s in facts["sources"]} == {
        "Django": "BSD-3-Clause", "kolibri": "MIT", "wagtail": "BSD-3-Clause", "Unicode CLDR through Babel": "Unicode-3.0, BSD-3-Clause",
    }  # fmt: skip
    for code in ("de_DE", "es_ES", "fr_FR"):
        assert facts["pairs"]["train"][code]["catalogue"] > 2500 and facts["pairs"]["train"][code]["date"] > 500
        assert sum(facts["pairs"]["held_out"][code].values()) > 200
    assert facts["removed"]["placeholder"]["de_DE"] > 500
    assert set(facts["held_out"]["text"]) == {"en", "de_DE", "es_ES", "fr_FR"}
    assert {part["prefix"]: part["share"] for part in json.loads((prepared / "cpt" / "blend.json").read_text())} == {
        "monolingual": 0.66, "parallel": 0.33, "instruction": 0.01,
    }  # fmt: skip
    chats = rows(prepared / "sft" / "train.jsonl")
    assert len(chats) == facts["sft"]["examples"]
    kinds = Counter(row["task"] for row in chats)
    assert abs(kinds["translation"] / len(chats) - 0.22) < 0.005
    assert len({row["messages"][0]["content"] for row in chats}) == len(chats)
    assert 500_000 < facts["sft_tokens"] < 800_000  # one epoch of the demo's SFT


def test_finished_folder_is_kept_and_other_settings_refused(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    assert prepare(demo(prepared)) == prepared
    assert "is ready" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"prepared with other settings \(data\.held_out, data\.vocab_size\): delete it"):
        prepare(demo(prepared, "data.vocab_size=2000", "data.held_out=0.2"))
    with pytest.raises(InputError, match=r"other settings \(model\.family\)"):
        prepare(demo(prepared, "model=tiny_qwen2"))
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before


def test_a_folder_that_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"exists but was not made by prepare_data: move it away"):
        prepare(demo(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


SMALL = ["data.locales=[nl_NL]", "data.cldr_kinds=[date,money]", "data.cldr_per_locale=400", "data.sft_examples=300"]


def small(folder: Path, *more: str) -> Config:
    cfg = demo(folder, *SMALL, *more)
    cfg.data.catalogues = {}
    return cfg


BAD = {
    "data.locales=[xx_XX]": "locale xx_XX is unknown",
    "data.locales=[en]": "besides en",
    "data.locales=[nl_NL,nl_NL]": "names one twice",
    "data.cldr_kinds=[weather]": "cldr_kinds=weather is unknown",
    "data.instruction_kinds=[dance]": "instruction_kinds=dance is unknown",
    "data.cldr_per_locale=0": "the training split has nothing in nl_NL",
    "data.held_out=1.5": "must lie between 0 and 1",
    "data.held_out=1e-9": "the held-out split has nothing in nl_NL",
    "+data.shares.other=0.5": "must give a share to each of monolingual, parallel, instruction",
    "data.shares.parallel=0.5": "must add up to 1",
    "data.instruction_kinds=[]": "instruction_kinds is empty",
    "data.sft_examples=0": "must be 1 or more",
    "data.sft_examples=9000": "only .* can be made",
    "data.vocab_size=60000": "vocab_size=60000 is too large for the training text",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_settings_are_one_sentence_and_write_nothing(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match=BAD[word]):
        prepare(small(tmp_path / "data", word))
    assert list(tmp_path.iterdir()) == []


def test_same_config_same_bytes_in_another_process(tmp_path: Path) -> None:
    """With other hashes of strings, other temporary names, and as the command line does it."""
    chosen = [*SMALL, "~data.catalogues.kolibri", "~data.catalogues.wagtail", "data.vocab_size=600"]
    here = prepare(demo(tmp_path / "here", *chosen))
    command = [sys.executable, "-m", "tools.prepare_data", f"data.folder={tmp_path / 'there'}", *chosen]
    subprocess.run(command, cwd=config.REPOSITORY, env={**os.environ, "PYTHONHASHSEED": "77"}, check=True)
    names = sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*") if p.is_file())
    assert [n for n in names if (here / n).read_bytes() != (tmp_path / "there" / n).read_bytes()] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "there"]


def test_qwen_and_a_real_tokenizer(tmp_path: Path) -> None:
    trained = prepare(small(tmp_path / "a", "model=tiny_qwen2", "data.vocab_size=400"))
    base = tmp_path / "base"
    tokenizer.load(trained / "tokenizer").save_pretrained(base)
    (base / "config.json").write_text("{}")
    copied = prepare(small(tmp_path / "b", "model=tiny_qwen2", f"model.hf_folder={base}", "data.vocab_size=400"))
    for name in ("cpt/parallel.bin", "cpt/monolingual.idx", "tokenizer/tokenizer.json"):
        assert (trained / name).read_bytes() == (copied / name).read_bytes()


def test_parallel_documents_go_both_ways_in_every_template() -> None:
    pairs = cldr.generate("nl_NL", ["date"], 400, seed=1)
    documents = [text for text, _ in corpora.parallel(pairs, seed=1)]
    lines = Counter(line.split(": ")[-1] for document in documents for line in document.split("\n"))
    assert all(lines[p.source] == 2 and lines[p.target] == 2 for p in pairs)
    assert sum(d.startswith("Translate the following English source text to Dutch:") for d in documents) > 20
    assert sum(d.startswith("Translate the following Dutch source text to English:") for d in documents) > 20
    assert sum(d.count("\n") > 3 for d in documents) > 20  # documents of several sentences


def test_the_manifest_counts_texts_by_template_and_the_locale_of_its_words(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = prepare(small(tmp_path / "data", "data.vocab_size=600"))
    corpus = IndexedDataset(str(folder / "cpt" / "parallel"))
    texts = tokenizer.load(folder / "tokenizer").batch_decode(corpus[:], skip_special_tokens=True)
    begins = Counter(re.match(r"Translate|\w+ ?\W", text)[0] for text in texts)
    told = manifest.verify(folder)["templates"]
    assert told.keys() == set(PARALLEL) and sum(sum(counts.values()) for counts in told.values()) == len(texts) > 400
    english, own, to, of = (told[f"{name}/1"] for name in ("english_names", "own_names", "target_titled", "source_titled"))
    assert told["released/1"] == {"en": begins["Translate"]} and own["nl_NL, en"] == begins["Nederlands:"] > 20
    assert english["en"] + sum(own.values()) == begins["English:"] + begins["Dutch:"] + begins["Nederlands:"]
    assert {code: to[code] + of[code] for code in to} == {"en": begins["Translation ("], "nl_NL": begins["Vertaling ("]}


def test_monolingual_documents_hold_each_string_once_a_locale() -> None:
    pairs = [Pair("de_DE", f"Page {i}", f"Seite {i}", "a") for i in range(50)] + [
        Pair("fr_FR", f"Page {i}", f"Page n° {i}", "a") for i in range(50)
    ]
    documents = corpora.monolingual(pairs, seed=1)
    for code, wanted in (("en", "Page"), ("de_DE", "Seite"), ("fr_FR", "Page n°")):
        strings = [line for c, text in documents if c == code for line in text.split("\n")]
        assert strings == [f"{wanted} {i}" for i in range(50)]


CHECKS = {
    "upper_case": ("Write in capital letters: red hat", "RED HAT"),
    "reverse": ("Reverse the order of the words: red hat sea", "sea hat red"),
    "sort": ("Sort the words from A to Z: sea hat", "hat sea"),
    "count": ("Count the words: red hat sea", "3"),
    "repeat": ("Repeat 3 times: hat", "hat hat hat"),
    "larger": ("Which number is larger, 97 or 101?", "101"),
    "without": ("Leave out hat: red hat sea", "red sea"),
}


def solve(kind: str, prompt: str) -> str:
    """The instruction worked out anew, by reading it."""
    asked = prompt.split(": ")[-1].split()
    numbers = [int(w) for w in prompt.replace(",", " ").replace("?", " ").split() if w.isdigit()]
    return {
        "upper_case": lambda: " ".join(asked).upper(),
        "first_word": lambda: asked[0],
        "last_word": lambda: asked[-1],
        "reverse": lambda: " ".join(asked[::-1]),
        "sort": lambda: " ".join(sorted(asked)),
        "count": lambda: str(len(asked)),
        "longest": lambda: sorted(asked, key=len)[-1],
        "commas": lambda: ", ".join(asked),
        "initials": lambda: " ".join(w[0] for w in asked),
        "spell": lambda: " / ".join("-".join(w) for w in asked),
        "repeat": lambda: " ".join(asked * numbers[0]),
        "without": lambda: " ".join(w for w in asked if w != prompt.split(": ")[0].split()[-1]),
        "contains": lambda: "yes" if prompt.split()[1] in prompt.split("? ")[1].split() else "no",
        "larger": lambda: str(max(numbers)),
        "add": lambda: str(sum(numbers)),
        "subtract": lambda: str(numbers[0] - numbers[1]),
    }[kind]()


def test_general_instructions_have_the_right_answer_and_two_sides() -> None:
    assert all(solve(kind, prompt) == answer for kind, (prompt, answer) in CHECKS.items())
    train = instructions.generate(list(instructions.KINDS), 3200, seed=1, held_out=False, share=0.1)
    test = instructions.generate(list(instructions.KINDS), 480, seed=1, held_out=True, share=0.1)
    assert len(train) == 3200 and set(Counter(e.kind for e in test)) == set(instructions.KINDS)
    for example in train + test:
        assert solve(example.kind, example.prompt) == example.answer, example
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert train == instructions.generate(list(instructions.KINDS), 3200, seed=1, held_out=False, share=0.1)


def test_translation_tasks_are_checkable_and_never_spell_a_held_out_string() -> None:
    pairs = cldr.generate("de_DE", ["date", "time"], 2400, seed=1)  # most times there are: damage often makes another
    train, _, held, _ = split(pairs, 0.2)
    made = tasks.generate(train, 1000, seed=1, held=held)
    assert len(made) == 1000 and made == tasks.generate(train, 1000, seed=1, held=held)
    kinds = Counter(e.kind for e in made)
    assert kinds["translation"] == 700 and set(kinds) == {"translation", "numbers", "casing", "post_edit", "ranking", "quality"}
    both = {p.source: p.target for p in train} | {p.target: p.source for p in train}
    by_source = {p.source: p.target for p in train}
    for e in made:
        assert not held.leaks(e.prompt) and not held.leaks(e.answer), e
        told = dict(line.split(": ", 1) for line in e.prompt.split("\n") if ": " in line)
        if e.kind == "translation":
            assert both[next(v for v in told.values() if v)] == e.answer
        elif e.kind == "post_edit":
            assert told["German"] != e.answer == by_source[told["English"]]
        elif e.kind == "ranking":
            assert told[e.answer] == by_source[told["English"]] != told["AB".replace(e.answer, "")]
        elif e.kind == "quality":
            assert e.answer == ("OK" if told["German"] == by_source[told["English"]] else "BAD")
        elif e.kind == "casing":
            assert told["Restore the capital letters"] == e.answer.lower() != e.answer
        else:
            assert all(number in told["Copy the numbers of this text"] for number in e.answer.split())
    damaged = [damage(p.target, random.Random(i)) for i, p in enumerate(train)]
    assert all(d != p.target for d, p in zip(damaged, train, strict=True))
    assert HeldOut([d for d in damaged if d]).leaks(next(d for d in damaged if d))


def test_an_example_is_a_chat_row() -> None:
    row = examples.Example("Hi", "Hallo", "translation", "translation", "de_DE").row()
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] and row["locale"] == "de_DE"
