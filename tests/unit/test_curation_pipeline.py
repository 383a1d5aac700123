"""The whole pipeline on sources with planted copies, leaks and damage: what goes, what stays, and the same bytes however it is run."""

import contextlib
import json
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.config_data import CurationConfig, ScoreConfig, SourceConfig
from megatron_tower.curation import folder, scores, shards
from megatron_tower.curation.engine import Stage, run, total
from megatron_tower.curation.filters import filters
from megatron_tower.curation.pipeline import ROWS, Pipeline
from megatron_tower.curation.readers import READERS
from megatron_tower.data import manifest
from megatron_tower.data import prepare as catalogues
from megatron_tower.data.templates import PARALLEL

PAGE = 4096
LEAK = "A ferry crossed the strait twice a day before the new bridge was opened to lorries and cars in May"


def words(rng: random.Random, count: int, alphabet: str = "abcdefghij") -> str:
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 9))) for _ in range(count))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """60 English and 60 German documents, 200 pairs in each of two files; a copy, a near copy, leaks, short rows, damage."""
    root, rng = tmp_path_factory.mktemp("sources"), random.Random(3)
    english = [{"text": words(rng, 120)} for _ in range(60)]
    english += [
        english[0],
        {"text": english[1]["text"] + " changed"},
        {"text": f"{words(rng, 50)} {LEAK} {words(rng, 50)}"},
        {"text": "short"},
    ]
    german = [{"text": words(rng, 120, "äöükln")} for _ in range(60)]
    pairs = [[{"source": words(rng, 9), "target": words(rng, 9, "äöükln")} for _ in range(200)] for _ in range(2)]
    pairs[1] += [pairs[0][0], pairs[0][1] | {"target": "etwas anderes"}, {"source": LEAK, "target": "Eine Fähre"}]
    files = [
        write(root / f"{name}.jsonl", rows) for name, rows in (("en", english), ("de", german), ("pairs0", pairs[0]), ("pairs1", pairs[1]))
    ]
    with open(files[0], "ab") as file:
        file.write(b"\xff\xfe\n{half\n" + b'{"text": "nul \x00"}\n')
    evaluation = write(root / "evaluation.jsonl", [{"source": LEAK, "target": "Eine Fähre überquerte die Meerenge"}])
    common = {"reader": "jsonl", "licence": "CC0-1.0", "origin": "made up"}
    fields = {"source": "source", "target": "target"}
    sources = {
        "english": SourceConfig(files=files[:1], fields={"text": "text"}, **common),
        "german": SourceConfig(files=files[1:2], locale="de_DE", fields={"text": "text"}, **common),
        "pairs": SourceConfig(files=files[2:], target_locale="de_DE", fields=fields, **common),
    }
    curation = CurationConfig(
        work=str(root / "work"),
        sources=sources,
        documents={"length": {"shortest": 20}},
        decontaminate=[evaluation],
        workers=2,
        patience=2.0,
    )
    made = load(["data=catalogues", "data.locales=[de_DE]", "data.cldr_per_locale=400", "data.sft_examples=400", "data.vocab_size=400"])
    return replace(
        made, data=replace(made.data, folder=str(root / "folder"), held_out=0.1, rl_prompts=40, preference_pairs=40, curation=curation)
    )


@pytest.fixture(scope="module")
def done(cfg: Config) -> Pipeline:
    """All stages run."""
    assert folder.prepare(cfg) == Path(cfg.data.folder)
    return Pipeline(cfg)


def content(stages: list[Stage]) -> dict[str, bytes]:
    return {
        f"{stage.name}/{p.relative_to(stage.root)}": p.read_bytes()
        for stage in stages
        for p in sorted(stage.root.rglob("*"))
        if p.is_file()
    }


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(pipeline: Pipeline) -> set[str]:
    return {row["id"] for task in range(len(pipeline.names)) for row in pipeline.selected(task)}


def test_what_goes_is_counted(done: Pipeline) -> None:
    first, second = (total(stage.facts()) for stage in (done.filter, done.select))
    assert first["rows"] == {"en": 64, "de_DE": 60, "en-de_DE": 403}
    assert first["anomalies"]["invalid_utf8"] == first["anomalies"]["nul_byte"] == 1 and len(first["anomalies"]) == 3
    assert first["removed"]["length"] == {"en": 1}
    held = first["removed"]["held_out"]
    assert 0 < held["en"] < 20 and 0 < held["de_DE"] < 20 and 10 < held["en-de_DE"] < 80
    assert second["rows"] == {"en": 63 - held["en"], "de_DE": 60 - held["de_DE"], "en-de_DE": 403 - held["en-de_DE"]}
    assert {reason: sum(counts.values()) for reason, counts in second["removed"].items()} == {
        "repeated": 2,
        "near_duplicate": 1,
        "repeated_source": 1,
        "contaminated": 2,
    }


def test_what_was_planted_is_gone_and_nothing_else(done: Pipeline) -> None:
    kept = ids(done)
    for gone in ("english/en.jsonl:61", "english/en.jsonl:62", "english/en.jsonl:63", "pairs/pairs1.jsonl:201", "pairs/pairs1.jsonl:203"):
        assert gone not in kept
    removed = sum(sum(counts.values()) for stage in (done.filter, done.select) for counts in total(stage.facts())["removed"].values())
    assert len(kept) == 64 + 60 + 403 - removed
    assert not any(LEAK in json.dumps(row) for task in range(len(done.names)) for row in done.selected(task))


def sets(root: Path, rng: random.Random) -> dict[str, dict[str, str]]:
    """Evaluation sets as they are published, 20 rows each: {path: {field: its text in the eighth row}}."""

    def wmt24pp(i: int) -> dict:
        told = {"lp": "en-de_DE", "domain": ("news", "speech")[i % 2], "document_id": f"test-en-news_a.{i}", "segment_id": i}
        target = words(rng, 20, "äöükln")
        return told | {"is_bad_source": False, "source": words(rng, 20), "target": target, "original_target": words(rng, 20, "äöükln")}

    def gsm8k(i: int) -> dict:
        return {"question": words(rng, 40), "answer": f"{words(rng, 30)}\n#### {i}"}

    def ifeval(i: int) -> dict:
        given = [{"relation": "at least", "num_words": 300, "keywords": None}, {}]
        return {"key": 1000 + i, "prompt": words(rng, 40), "instruction_id_list": ["length_constraints:number_words"], "kwargs": given}

    def math(i: int) -> dict:
        return {"problem": words(rng, 30), "solution": words(rng, 30), "answer": str(i), "subject": "Algebra", "level": i % 5}

    def arena(i: int) -> dict:
        return {"question_id": str(i), "category": "arena-hard-v0.1", "turns": [{"content": words(rng, 30), "role": "user"}]}

    planted = {}
    for name, row in (("en-de_DE", wmt24pp), ("gsm8k", gsm8k), ("ifeval", ifeval), ("math", math), ("m_arenahard", arena)):
        rows = [row(i) for i in range(20)]
        long = rows[7] | {f"turns.{i}": turn["content"] for i, turn in enumerate(rows[7].get("turns", []))}
        path = write(root / f"{name}.jsonl", rows)
        planted[path] = {field: text for field, text in long.items() if isinstance(text, str) and len(text.split()) > 12}
    return planted


def test_every_field_of_an_evaluation_set_is_found(cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a document and in a pair; what only says a set's label or number stays."""
    rng = random.Random(9)
    planted = sets(tmp_path, rng)
    leaks = [(path, text.split("\n")[0]) for path, fields in planted.items() for text in fields.values()]
    assert len(leaks) == 9
    clean = [words(rng, 60) for _ in range(20)] + [
        f"{words(rng, 30)}\n{label}\n{words(rng, 30)}"
        for label in ("news", "Speech", "at least", "Algebra", "user", "7", "en-de_DE", "arena-hard-v0.1")
    ]
    documents = write(
        tmp_path / "documents.jsonl",
        [{"text": text} for text in clean] + [{"text": f"{words(rng, 20)}\n{leak} {words(rng, 20)}"} for _, leak in leaks],
    )
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"source": words(rng, 9), "target": words(rng, 9)} for _ in range(20)]
        + [{"source": "News", "target": "Speech"}]
        + [{"source": words(rng, 9), "target": f"{words(rng, 3)} {leak}"} for _, leak in leaks],
    )
    sources = {
        "documents": replace(cfg.data.curation.sources["english"], files=[documents]),
        "pairs": replace(cfg.data.curation.sources["pairs"], files=[pairs]),
    }
    curation = replace(cfg.data.curation, work=str(tmp_path / "work"), sources=sources, documents={}, decontaminate=list(planted))
    asked = replace(cfg, data=replace(cfg.data, held_out=1e-9, curation=replace(curation, stages=["filter", "duplicates", "select"])))
    folder.prepare(asked)
    found = Pipeline(asked)
    facts = total(found.select.facts())
    assert {reason: sum(counts.values()) for reason, counts in facts["removed"].items()} == {"contaminated": 18}
    assert facts["leaks"] == {path: 2 * len(fields) for path, fields in planted.items()}
    assert ids(found) == {f"documents/documents.jsonl:{i}" for i in range(1, 29)} | {f"pairs/pairs.jsonl:{i}" for i in range(1, 22)}
    printed = capfd.readouterr().out
    assert all(f"of {path}" in printed for path in planted)
    for row in (row for task in range(2) for row in shards.read(found.select.folder(task) / "removed.jsonl.zst")):
        text = row.get("text") or row["target"]
        assert row["repeats"] == [path for path in planted if any(leak in text for of, leak in leaks if of == path)]


def test_removed_rows_can_be_looked_at(done: Pipeline) -> None:
    removed = [row for task in range(len(done.names)) for row in shards.read(done.select.folder(task) / "removed.jsonl.zst")]
    assert {(row["reason"], row["id"]) for row in removed} >= {
        ("contaminated", "english/en.jsonl:63"),
        ("near_duplicate", "english/en.jsonl:62"),
    }


def test_the_folder_can_be_trained_on(done: Pipeline, cfg: Config) -> None:
    facts = manifest.verify(Path(cfg.data.folder))
    assert facts["cpt_tokens"].keys() == {"monolingual", "parallel", "instruction"}
    for part in ("monolingual", "parallel"):
        assert facts["cpt_tokens"][part] == sum(facts["cpt_tokens_by_language"][part].values())
        planned = sum(one["tokens"] for one in facts["planned"] if one["part"] == part)
        assert facts["cpt_tokens"][part] == pytest.approx(planned, rel=0.1)
    assert facts["templates"].keys() == set(PARALLEL) and facts["templates"]["target_titled/1"].keys() == {"de_DE", "en"}
    assert sum(sum(counts.values()) for counts in facts["templates"].values()) == 2 * sum(1 for task in (2, 3) for _ in done.selected(task))
    assert {source["licence"] for source in facts["sources"]} >= {"CC0-1.0"}
    from megatron_tower.data import build, tokenizer

    words = tokenizer.load(Path(cfg.data.folder) / "tokenizer")
    for phase in ("cpt", "sft"):
        asked = load([f"phase={phase}", "phase.seq_length=64", "phase.global_batch_size=1", "phase.micro_batch_size=1"])
        rows = build.training_dataset(replace(asked, data=cfg.data), words, 4)
        assert rows[0].tokens.shape == (1, 64)


def test_held_out_text_is_not_trained_on(done: Pipeline, cfg: Config) -> None:
    training = " ".join(
        text for task in range(len(done.names)) for row in done.selected(task) for text in row.values() if isinstance(text, str)
    )
    held = [json.loads(line) for line in (Path(cfg.data.folder) / "held_out" / "text.jsonl").read_text().splitlines()]
    assert held and not any(row["text"] in training for row in held)


def test_a_second_run_finds_everything_done(done: Pipeline, cfg: Config, capfd: pytest.CaptureFixture[str]) -> None:
    before = content(done.stages)
    folder.prepare(cfg)
    assert "is ready (same settings, files verified)" in capfd.readouterr().out and content(done.stages) == before


def test_an_array_makes_the_same_bytes(done: Pipeline, cfg: Config, tmp_path: Path) -> None:
    """Three workers one after the other, of which the second never comes: what it leaves the last does."""
    moved = replace(cfg.data.curation, work=str(tmp_path), patience=0.1, workers=1)
    for part in ("2/3", "0/3"):
        one = replace(cfg, data=replace(cfg.data, folder=str(tmp_path / "folder"), curation=replace(moved, part=part)))
        made = folder.prepare(one)
    assert content(Pipeline(one).stages) == content(done.stages)
    assert files(made) == files(Path(cfg.data.folder))


def test_killed_at_random_moments_it_ends_with_the_same_bytes(done: Pipeline, cfg: Config, tmp_path: Path) -> None:
    """The stages that read and filter, under fire until each is done: most runs lose a worker, some two."""
    again = Pipeline(replace(cfg, data=replace(cfg.data, curation=replace(cfg.data.curation, work=str(tmp_path)))))
    rng, kills, over = random.Random(5), 0, threading.Event()
    others = {child.pid for child in psutil.Process().children()}  # such as what stops the tests' Slurm

    def fire() -> None:
        nonlocal kills
        while not over.wait(rng.uniform(0.0, 0.3) if kills else 0.0):  # the first one is sure to hit, whatever the machine's speed
            workers = [child for child in psutil.Process().children() if child.pid not in others]
            if workers and (not kills or rng.random() < 0.7):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rng.choice(workers).kill()
                    kills += 1

    for stage in again.stages[:3]:
        for _ in range(100):
            over.clear()
            shooter = threading.Thread(target=fire)
            if kills < 8:
                shooter.start()
            try:
                run(stage, 2)
            except InputError as error:
                assert "ended by signal 9" in str(error)
            finally:
                over.set()
                if shooter.ident:
                    shooter.join()
            if not stage.missing():
                break
    assert kills and content(again.stages[:3]) == content(done.stages[:3])


def test_a_disk_that_fills_again_and_again(done: Pipeline, cfg: Config, tmp_path: Path, disk: Callable[[int], Path]) -> None:
    """A real one, with a little more room each time: each stage and the folder meet its end, and the bytes are those of a large disk."""
    size, room, told = 8 * PAGE, disk(8 * PAGE), []
    curation = replace(cfg.data.curation, work=str(room / "work"))
    again = replace(cfg, data=replace(cfg.data, folder=str(room / "folder"), curation=curation))
    while not (room / "folder").is_dir():
        try:
            folder.prepare(again)
        except InputError as error:
            told += re.findall(r"the disk of \S+/(\w+?)(?:-\w+)? is full: free space and run the same command again$", str(error)) or [
                error
            ]
            assert not [path for path in room.rglob("*") if path.name.startswith(".") or path.suffix == ".traceback"]
        size += size // 3 if "tokenize" in told else 8 * PAGE
        disk(size)
    assert set(told) >= {"filter", "select", "plan", "tokenize", "folder"}
    assert content(Pipeline(again).stages) == content(done.stages)
    assert files(room / "folder") == files(Path(cfg.data.folder))


def test_a_changed_setting_keeps_the_stages_before_it(done: Pipeline, cfg: Config) -> None:
    def stages(**changed: object) -> list[str]:
        curation = replace(cfg.data.curation, **changed)
        return [stage.name for stage in Pipeline(replace(cfg, data=replace(cfg.data, curation=curation))).stages if stage.missing()]

    assert stages() == []
    assert stages(tokens=1000) == ["plan", "tokenize"]
    assert stages(ngram=8) == ["select", "plan", "tokenize"]
    without = {name: source for name, source in cfg.data.curation.sources.items() if name != "german"}
    assert stages(sources=without) == ["duplicates", "select", "plan", "tokenize"]
    assert stages(documents={}) == ["filter", "duplicates", "select", "plan", "tokenize"]


def test_a_budget_is_kept(done: Pipeline, cfg: Config) -> None:
    full = total(done.tokenize.facts())["tokens"]
    curation = replace(cfg.data.curation, tokens=6000)
    less = Pipeline(replace(cfg, data=replace(cfg.data, curation=curation)))
    for stage in less.stages:
        run(stage, 2)
    drawn = total(less.tokenize.facts())["tokens"]
    assert sum(drawn["monolingual"].values()) == pytest.approx(0.66 * 6000, rel=0.25)
    assert sum(drawn["parallel"].values()) < sum(full["parallel"].values())
    planned = {(one["part"], one["language"]): one for one in less.plan.facts()[0]["planned"]}
    assert 0 < planned["monolingual", "en"]["fraction"] < 1


def test_scores_decide_who_stays(done: Pipeline, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score a length of the text, for the documents that repeat no other alone."""
    asked: list[int] = []
    monkeypatch.setattr(scores, "check", lambda name, score: None)
    monkeypatch.setattr(scores, "fingerprint", lambda score: "x")
    monkeypatch.setattr(scores, "score", lambda rows, score: [float(len(row["text"])) for row in rows])
    lengths = sorted(len(row["text"]) for row in done.selected(0))
    least = float(lengths[10])
    curation = replace(cfg.data.curation, document_scores={"edu": ScoreConfig(model="x", minimum=least, minimum_of={"de_DE": 0.0})})
    scored = Pipeline(replace(cfg, data=replace(cfg.data, curation=curation)))
    for stage in scored.stages[:4]:
        run(stage, 2)
    assert [stage.name for stage in scored.stages] == ["filter", "duplicates", "score_edu", "select", "plan", "tokenize"]
    assert folder.stage_names(scored.curation) == ["fetch", *(stage.name for stage in scored.stages)]
    kept = [len(row["text"]) for row in shards.read(scored.select.folder(0) / ROWS)]
    assert sorted(kept) == lengths[10:] and asked == []
    assert total(scored.select.facts())["removed"]["low_edu"] == {"en": 10}
    assert ids(scored) - {f"english/en.jsonl:{i}" for i in range(1, 65)} == ids(done) - {f"english/en.jsonl:{i}" for i in range(1, 65)}


@pytest.mark.parametrize("name", ["debian", "tower_plus"])
def test_the_data_sets_of_conf_can_be_made(name: str) -> None:
    """As far as settings and filters tell."""
    cfg = load([f"data={name}"])
    catalogues.check(cfg.data)
    assert filters("documents", cfg.data.curation.documents) and filters("pairs", cfg.data.curation.pairs)
    assert all(source.reader in READERS and source.licence and source.origin for source in cfg.data.curation.sources.values())


def test_settings_of_the_folder_are_asked_before_the_stages(cfg: Config, tmp_path: Path) -> None:
    curation = replace(cfg.data.curation, work=str(tmp_path / "work"))
    with pytest.raises(InputError, match=r"data.instruction_kinds is empty"):
        folder.prepare(replace(cfg, data=replace(cfg.data, curation=curation, folder=str(tmp_path / "folder"), instruction_kinds=[])))
    assert not list(tmp_path.iterdir())


def test_nothing_is_fetched_where_a_word_is_wrong(cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tower.curation.pipeline.fetch", lambda *_: pytest.fail("fetched"))
    for changed in ({"stages": ["tokenise"]}, {"pairs": {"lenght": {}}}, {"decontaminate": ["missing.jsonl"]}):
        curation = replace(cfg.data.curation, work=str(tmp_path / "work"), **changed)
        with pytest.raises(InputError):
            folder.prepare(replace(cfg, data=replace(cfg.data, curation=curation, folder=str(tmp_path / "folder"))))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"part": "3/3"}, r"data.curation.part=3/3 must be like 0/4"),
        (
            {"stages": ["tokenise"]},
            r"tokenise is unknown: use some of fetch, filter, duplicates, select, plan, tokenize",
        ),
        ({"documents": {"lenght": {}}}, r"data.curation.documents.lenght is unknown"),
        ({"decontaminate": ["missing.jsonl"]}, r"missing.jsonl can't be read .No such file"),
        ({"decontaminate": [__file__]}, r"pipeline.py:1: not JSON .*.data.curation.decontaminate.$"),
        ({"sources": {}}, r"names no sources"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(cfg: Config, tmp_path: Path, changed: dict, said: str) -> None:
    curation = replace(cfg.data.curation, work=str(tmp_path / "work"), **changed)
    with pytest.raises(InputError, match=said):
        folder.prepare(replace(cfg, data=replace(cfg.data, curation=curation, folder=str(tmp_path / "folder"))))
    assert not list(tmp_path.iterdir())
