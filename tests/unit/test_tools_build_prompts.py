"""From public rows, judgements and pairs to GRPO's prompts: what each becomes, what is left out and counted, what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.curation import prompts as curation
from megatron_tower.data import cldr, prompts, published
from megatron_tower.rewards import instructions, maths, reward
from megatron_tower.rewards.pool import Verdict, VerifierPool
from megatron_tower.rewards.worker import outcome
from tools import build_prompts

GSM8K = {
    "question": "Natalia sold {} clips and half as many again. How many in all?",
    "answer": "Half is <<48/2=24>>24.\nSo 48 + 24 = <<48+24=72>>72.\n#### 72",
}
MATH = {"problem": "Halve {}.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}
IFEVAL = {
    "key": 1000,
    "prompt": "Describe town {} without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None, "relation": None}, {"num_words": 30, "relation": "at least"}],
}
FUNCTION = {  # Tulu's rows have every argument that any of its functions knows
    **dict.fromkeys(("N", "quantifier", "end_phrase", "keyword_list", "word", "forbidden_words", "letter", "i", "first_word")),
    **dict.fromkeys(("postscript_marker", "options", "section_splitter", "original_prompt", "language")),
}
JUDGED = {"source_locale": "en", "target_locale": "de_DE", "source": "Close window {} before you leave.", "doc": "a", "seg_id": 0}


def rlvr(prompt: str, truth: str, dataset: str) -> dict:
    told = {"constraint_type": "...", "constraint": "..."} if dataset == "ifeval" else {}
    return {"messages": [{"role": "user", "content": prompt}], "ground_truth": truth, "dataset": dataset, **told}


def function(name: str, **arguments: object) -> str:
    return json.dumps({"func_name": name, **FUNCTION, **arguments})


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(row: dict, count: int) -> list[dict]:
    """Rows apart in the texts that hold {}."""
    return [{name: value.format(n) if "{}" in str(value) else value for name, value in row.items()} for n in range(count)]


def pairs(per_locale: int, codes: tuple[str, ...]) -> list[dict]:
    """Dates, sums and names, two in a row, as curation writes pairs."""
    found = []
    for code in codes:
        made = cldr.generate(code, ["date", "money", "unit", "territory", "language"], per_locale, 1)
        for n, (one, two) in enumerate(zip(made, made[::-1], strict=True)):
            texts = {"source": f"{one.source}: {two.source}", "target": f"{one.target}: {two.target}"}
            found.append({"id": f"c/{code}:{n}", "source_locale": "en", "target_locale": code, **texts})
    return found


def word(value: object) -> str:
    """As Hydra writes it: keys without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {word(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value)


class Setting:
    """A folder with a file for each source; shares are equal where not said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sources = folder, {}

    def source(self, name: str, form: str, *rows: dict, share: float = 1.0) -> None:
        path = write(self.folder / f"{name}.jsonl", *rows)
        self.sources[name] = {"form": form, "files": [str(path)], "share": share, "licence": f"licence of {name}", "origin": f"{name} 1.0"}

    def config(self, count: int, *words: str) -> Config:
        settings = {"sources": self.sources, "count": count, "output": f"{self.folder}/prompts.jsonl"}
        return load([*(f"++prompts.{name}={word(value)}" for name, value in settings.items()), *words])

    def build(self, count: int, *words: str) -> list[dict]:
        build_prompts.build(self.config(count, *words))
        return prompts.read(self.folder / "prompts.jsonl")

    def counts(self, name: str) -> dict[str, int]:
        told = json.loads((self.folder / "prompts.jsonl.manifest.json").read_text())
        return told["sources"][name]["counts"]


class Here:
    """The rewards in this process: starting others takes seconds."""

    def __init__(self, processes: int, timeout: float) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None: ...

    def score(self, asked: list[tuple[dict, str]]) -> list[Verdict]:
        told = [outcome(reward, item, answer, begun=lambda: None) for item, answer in asked]
        return [Verdict(one.get("score"), one.get("problem")) for one in told]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(curation, "VerifierPool", Here)
    return Setting(tmp_path)


def test_all_kinds_by_their_shares_with_what_they_come_from(setting: Setting):
    setting.source("gsm", "gsm8k", *numbered(GSM8K, 12), share=0.2)
    setting.source("competition", "math", *numbered(MATH, 12), share=0.1)
    setting.source("following", "ifeval", *numbered(IFEVAL, 12), share=0.1)
    setting.source("tulu", "rlvr", rlvr("Third of 9?", "3", "gsm8k"), rlvr("Shout.", function("validate_uppercase"), "ifeval"), share=0.05)
    judged = [
        row | {"target": f"{text} {n}.", "mqm": score}
        for n, row in enumerate(numbered(JUDGED, 9))
        for text, score in (("Zu", 0.0), ("Auf", -5.0))
    ]
    setting.source("mqm", "judgements", *judged, share=0.15)
    setting.source("parallel", "pairs", *pairs(20, ("de_DE", "ja_JP")), share=0.4)
    items = setting.build(40)
    assert Counter(item["source"] for item in items) == {"gsm": 8, "competition": 4, "following": 4, "tulu": 2, "mqm": 6, "parallel": 16}
    assert Counter(item["reward"] for item in items) == {"maths": 13, "instructions": 5, "preference": 6, "translation": 16}
    assert Counter(item["locale"] for item in items if item["source"] == "parallel") == {"de_DE": 8, "ja_JP": 8}
    assert len({item["prompt"] for item in items}) == len({item["id"] for item in items}) == 40
    told = json.loads((setting.folder / "prompts.jsonl.manifest.json").read_text())
    assert told["prompts"] == 40 and told["sources"]["mqm"]["licence"] == "licence of mqm" and told["sources"]["gsm"]["counts"]["kept"] == 8
    (first,) = [item for item in items if item["id"] == "gsm/gsm.jsonl:3"] or items[:1]
    assert first["answer"] == "72" and maths.score(first, "It is 72.") == 1 and maths.score(first, "24") == 0
    from_pair = next(item for item in items if item["source"] == "parallel")
    assert from_pair["id"].startswith("c/") and from_pair["origin"] == from_pair["id"].split("#")[0]


def test_the_same_again_is_not_made_and_another_not_overwritten(setting: Setting, capsys):
    setting.source("gsm", "gsm8k", *numbered(GSM8K, 6))
    once = setting.build(4)
    before = (setting.folder / "prompts.jsonl").read_bytes()
    assert setting.build(4, "prompts.processes=2") == once and "there already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"made with another prompts\.count"):
        setting.build(5)
    assert (setting.folder / "prompts.jsonl").read_bytes() == before


def test_duplicates_leaks_and_long_prompts_go_and_are_counted(setting: Setting, tmp_path: Path):
    from megatron_tower.data import tokenizer

    tokenizer.train(["Natalia sold clips and half as many again. How many in all?"] * 9, "qwen2", 330, tmp_path / "tokenizer")
    rows = numbered(GSM8K, 8)
    rows[3] = rows[2] | {"question": f"  {rows[2]['question'].upper()} "}
    rows[5] = rows[5] | {"question": rows[5]["question"] + " Take your time." * 60}
    leak = "A train leaves the town at nine and another at ten, so when do the two of them meet?"
    rows[6] = rows[6] | {"question": f"Think well. {leak} Say it in hours."}
    held = write(tmp_path / "benchmark.jsonl", {"id": 7, "inner": {"question": leak}})
    setting.source("gsm", "gsm8k", *rows)
    words = [f"prompts.decontaminate=[{held}]", f"prompts.tokenizer={tmp_path}/tokenizer", "prompts.max_prompt_tokens=200"]
    items = setting.build(5, *words)
    counts = setting.counts("gsm")
    assert counts == {"read": 8, "kept": 5, "duplicate": 1, "contaminated": 1, "too long": 1}
    assert not any(leak in item["prompt"] for item in items)
    with pytest.raises(InputError, match=r"gsm has not the 6 prompts of its share \(8 read.*1 contaminated"):
        setting.build(6, *words, f"prompts.output={tmp_path}/more.jsonl")
    assert not list(tmp_path.glob("*more.jsonl*"))


def test_a_leaked_pair_gives_no_prompt_in_any_form(setting: Setting, tmp_path: Path):
    rows = pairs(12, ("de_DE", "fr_FR"))
    leaked = "The old lighthouse keeper climbed 240 steps each evening to light the lamp for the ships"
    rows += [rows[0] | {"id": "leak", "source": leaked, "target": f"Der alte Mann {n}"} for n in range(30)]
    setting.source("parallel", "pairs", *rows, rows[0] | {"source_locale": "de", "target_locale": "fr"})
    held = write(tmp_path / "held.jsonl", {"source": leaked})
    items = setting.build(20, f"prompts.decontaminate=[{held}]")
    assert setting.counts("parallel")["contaminated pair"] == 30 and setting.counts("parallel")["pair without English"] == 1
    assert len(items) == 20 and not any("lighthouse" in item["prompt"] for item in items)


def test_pairs_give_more_prompts_than_there_are_pairs_in_equal_parts(setting: Setting, monkeypatch):
    """In blocks as small as these, whatever the order of the file; one seed gives one file."""
    monkeypatch.setattr(curation, "BLOCK", 7)
    codes = ("de_DE", "zh_CN", "ru_RU")
    few = pairs(4, codes[:1])
    setting.source("parallel", "pairs", *few, *pairs(30, codes[1:]))
    items = setting.build(90)
    by_locale = Counter(item["locale"] for item in items)
    assert len(items) == 90 and by_locale[codes[0]] > len(few) and min(by_locale.values()) >= 20
    assert len({family for item in items for family in item["family"].split("+")}) > 6
    first = (setting.folder / "prompts.jsonl").read_bytes()
    again = setting.config(90, f"prompts.output={setting.folder}/again.jsonl")
    build_prompts.build(again)
    assert (setting.folder / "again.jsonl").read_bytes() == first


def test_pairs_that_run_dry_end_in_one_sentence(setting: Setting):
    setting.source("parallel", "pairs", *pairs(2, ("de_DE",))[:1])
    with pytest.raises(InputError, match="has not the 5000 prompts of its share"):
        setting.build(5000, "prompts.families=[casing]")


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("validate_lowercase", {}, "all of it is small", "Not All"),
        ("verify_keywords", {"keyword_list": ["tram", "bridge"]}, "the tram on the bridge", "the tram"),
        ("verify_keyword_frequency", {"word": "tram", "N": 2}, "tram and tram", "tram and tram, tram"),
        ("validate_word_constraint", {"N": 20, "quantifier": "around"}, "word " * 19, "word " * 25),
        ("validate_word_constraint", {"N": 3, "quantifier": "at most"}, "one two three", "one two three four"),
        ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "then"}, "one\n\nthen two", "one\n\ntwo"),
        ("verify_bullet_points", {"N": 2}, "* one\n* two", "* one"),
        ("validate_sections", {"N": 2, "section_splitter": "PART"}, "PART 1\nx\nPART 2\ny", "PART 1\nx"),
        ("validate_frequency_capital_words", {"N": 2, "quantifier": "at least"}, "ONE and TWO", "ONE and two"),
        ("validate_end", {"end_phrase": "The end."}, "So be it. The end.", "So be it."),
        ("verify_letter_frequency", {"letter": "z", "N": 1}, "a zoo", "zz"),
    ],
)
def test_the_functions_of_tulu_become_checkers_of_ifeval(name: str, arguments: dict, good: str, bad: str):
    item = published.FORMS["rlvr"](rlvr("Write.", function(name, **arguments), "ifeval"), "here")
    if "capital" in name:
        pytest.importorskip("nltk")
        try:
            instructions._require_punkt(name)
        except InputError:
            pytest.skip("needs punkt_tab")
    assert instructions.score(item, good) == 1 and instructions.score(item, bad) < 1


def test_what_no_reward_can_check_goes_and_is_told(setting: Setting, monkeypatch, capsys):
    """An instruction that IFEval has no checker for, one with an argument missing: asked in a process that can be killed."""
    monkeypatch.setattr(curation, "VerifierPool", VerifierPool)
    setting.source(
        "tulu",
        "rlvr",
        rlvr("Halve 9.", "4.5", "MATH"),
        rlvr("Divide.", function("verify_paragraph_count", N=3), "ifeval"),
        rlvr("Choose.", function("validate_choice", options=["red", "blue"]), "ifeval"),
        rlvr("End.", function("validate_end"), "ifeval"),
        rlvr("Lists.", "[{'instruction_id': ['punctuation:no_comma'], 'kwargs': [None]}]", "ifeval"),
    )
    items = setting.build(2)
    assert {item["prompt"] for item in items} == {"Halve 9.", "Lists."}
    assert setting.counts("tulu") == {"read": 3, "kept": 2, "no checker for its instruction": 2, "its reward can't check it": 1}
    assert "tulu/tulu.jsonl:4" in capsys.readouterr().out


BAD = [
    ("gsm8k", GSM8K | {"answer": "72"}, r"1: its solution states no answer"),
    ("gsm8k", {"prompt": "..."}, r'1: "question" must be a text'),
    ("math", MATH | {"solution": "It is a half."}, r"1: its solution states no answer"),
    ("ifeval", IFEVAL | {"kwargs": []}, r"1: instruction_id_list and kwargs must be two lists of one length"),
    ("rlvr", rlvr("...", "42", "code"), r"1: dataset is 'code'"),
    ("rlvr", rlvr("...", function("validate_rhyme"), "ifeval"), r"1: ground_truth names the function 'validate_rhyme'"),
    ("rlvr", rlvr("...", "not json", "ifeval"), r"1: ground_truth names the function None"),
    ("rlvr", rlvr("...", function("validate_word_constraint", N="3"), "ifeval"), r"1: ground_truth has N='3'"),
    ("rlvr", rlvr("...", "4", "gsm8k") | {"messages": [{"role": "assistant", "content": "x"}]}, r"1: messages must be one user turn"),
    ("judgements", {"source": "x", "target": "y", "mqm": 3, "lp": "en-de"}, r"1: mqm is 3"),
    ("pairs", {"source": "x", "target": "", "source_locale": "en", "target_locale": "de"}, r'1: "target" must be a text'),
    ("pairs", {"source": "x", "target": "y", "source_locale": "en", "target_locale": "tlh"}, r"1: language tlh is unknown"),
    ("poems", GSM8K, r"form=poems is unknown"),
]


@pytest.mark.parametrize(("form", "row", "told"), BAD, ids=[f"{form}-{told[:24]}" for form, _, told in BAD])
def test_bad_rows_are_one_sentence_with_their_place(setting: Setting, form: str, row: dict, told: str):
    setting.source("bad", form, row)
    with pytest.raises(InputError, match=told):
        setting.build(1)
    assert not list(setting.folder.glob("*prompts.jsonl*"))


@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({}, ["prompts.count=0"], "ask for some prompts"),
        ({}, ["prompts.decontaminate=[nowhere.jsonl]"], r"there is no nowhere\.jsonl"),
        ({}, ["prompts.tokenizer=nowhere"], r"holds no tokenizer_config\.json"),
        ({"share": 0.5}, [], "1 their sum"),
        ({"files": ["nowhere/*.jsonl"]}, [], "there is no nowhere"),
        ({"files": []}, [], "files is empty"),
        ({"form": "pairs"}, [], '"source" must be a text'),
    ],
)
def test_bad_settings_are_refused(setting: Setting, changed: dict, words: list[str], told: str):
    setting.source("gsm", "gsm8k", *numbered(GSM8K, 2))
    setting.sources["gsm"] |= changed
    with pytest.raises(InputError, match=told):
        setting.build(2, *words)


def test_an_answer_that_its_reward_rejects_or_never_reads_goes(setting: Setting, monkeypatch):
    verdicts = iter([Verdict(1.0), Verdict(0.0), Verdict(None, "timeout"), Verdict(0.5)])
    monkeypatch.setattr(Here, "score", lambda self, asked: [next(verdicts) for _ in asked])
    setting.source("gsm", "gsm8k", *numbered(GSM8K, 4))
    assert len(setting.build(1)) == 1
    assert setting.counts("gsm") == {"read": 4, "kept": 1, "its reward rejects its answer": 2, "its check timed out": 1}
