"""IFEval's figures are those that lm-eval's own task computes from the same answers."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from evaluation.metrics.bootstrap import Resampling
from evaluation.tasks import TASKS
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.rewards.instructions import _registry, fetch_punkt, score

KINDS: list[tuple[str, dict]] = [  # each of IFEval's but the two that need NLTK's data, with one way to ask it
    ("keywords:existence", {"keywords": ["river", "stone"]}),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "at least"}),
    ("keywords:forbidden_words", {"forbidden_words": ["stone"]}),
    ("keywords:letter_frequency", {"letter": "r", "let_frequency": 5, "let_relation": "at least"}),
    ("language:response_language", {"language": "de"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 12, "relation": "at least"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "the"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say something of rivers."}),
    ("startend:end_checker", {"end_phrase": "That is all."}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
    ("startend:quotation", {}),
]
WITH_PUNKT: list[tuple[str, dict]] = [
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}),
]
SPANISH: list[tuple[str, dict]] = [
    ("es:keywords:existence", {"keywords": ["río"]}),
    ("es:length_constraints:number_words", {"num_words": 5, "relation": "at least"}),
    ("es:length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
    ("es:detectable_format:constrained_response", {}),
    ("es:change_case:spanish_capital", {}),
    ("es:punctuation:question_marks", {}),
    ("es:special_character:tildes", {"num_words": 1, "relation": "at least"}),
    ("es:special_character:enie", {"let_frequency": 1}),
]
SPANISH_PIECES = (
    "El río pasa por el pueblo.",
    "¿Dónde está la montaña?",
    "Quizás.",
    "EL RÍO PASA POR LA CIUDAD.",
    "agua, agua",
    "\n* uno\n",
    "año",
)
PIECES = (
    "the one\n\nthe other", "The river runs past the stone.", "the river is wide, and cold.", "\n\n", "***", "* one\n* two\n",
    "*highlighted*", "<<A title>>", "[place]", "P.S. goodbye", "SECTION 1\nhere\nSECTION 2\nthere", '{"a": 1}', "******",
    "My answer is yes.", "That is all.", '"', "Say something of rivers.", "Der Fluss fließt an dem Stein vorbei und ins Meer.",
    "ALL IN CAPITALS.", "nothing, really", "river river",
)  # fmt: skip


def rows(count: int, kinds: list[tuple[str, dict]] = KINDS, pieces: tuple[str, ...] = PIECES) -> list[tuple[dict, str]]:
    """(row of google/IFEval, an answer made of pieces), repeatable."""
    rng, made = random.Random(7), []
    for number in range(count):
        asked = [kinds[number % len(kinds)], *rng.sample(kinds, rng.randrange(0, 3))]
        filled = [{name: None for _, kwargs in kinds for name in kwargs} | kwargs for _, kwargs in asked]  # as `datasets` gives them
        row = {"key": number, "prompt": "Say something of rivers.", "instruction_id_list": [name for name, _ in asked], "kwargs": filled}
        answer = "".join(rng.choice((" ", "\n")) + piece for piece in rng.sample(pieces, rng.randrange(0, 6)))
        made.append((row, answer if number % 5 else answer.strip()))
    return made


@pytest.fixture
def ifeval(tmp_path: Path):
    def load(published: list[dict], task: str = "ifeval") -> list[dict]:
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published), encoding="utf-8")
        return TASKS[task].load(EvalConfig(name="t", sources={task: str(tmp_path)}))

    return load


def compare(load: Callable, made: list[tuple[dict, str]], process: Callable, task: str = "ifeval") -> dict[str, float]:
    """Our figures, held to those that lm-eval's `process_results` gives each answer."""
    loaded = load([row for row, _ in made], task)
    answers = TASKS[task].verify(loaded, [{"output": answer, "finish": "stop"} for _, answer in made], None)
    ours = {s.metric: s.estimate.value / 100 for s in TASKS[task].score(loaded, answers, Resampling(samples=20)) if s.by == "all"}
    theirs = [process(row, [answer]) for row, answer in made]
    for kind in ("strict", "loose"):
        prompts, each = (([one[f"{level}_level_{kind}_acc"] for one in theirs]) for level in ("prompt", "inst"))
        assert ours[f"prompt_{kind}"] == pytest.approx(sum(prompts) / len(prompts))
        flat = [followed for one in each for followed in one]
        assert ours[f"instruction_{kind}"] == pytest.approx(sum(flat) / len(flat))
    return ours


def test_every_figure_is_lm_evals(ifeval):
    _registry()  # keeps lm-eval from downloading
    from lm_eval.tasks.ifeval import utils

    ours = compare(ifeval, rows(230), utils.process_results)
    assert 0.1 < ours["instruction_strict"] < ours["instruction_loose"] < 0.9


def test_so_are_those_of_the_two_kinds_that_count_with_nltks_data(ifeval, monkeypatch: pytest.MonkeyPatch):
    _registry()
    import nltk
    from lm_eval.tasks.ifeval import utils

    try:
        data = fetch_punkt(Path(os.environ.get("MEGATRON_TOWER_CACHE") or Path.home() / ".cache" / "megatron_tower"))
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(nltk.data, "path", [str(data)])
    ours = compare(ifeval, rows(60, WITH_PUNKT), utils.process_results)
    assert 0.1 < ours["instruction_strict"] <= ours["instruction_loose"] < 1


@pytest.fixture
def spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what lm-eval's Spanish and Catalan checkers import: words between spaces, sentences between full stops."""

    class Document(list):
        @property
        def sents(self) -> list[str]:
            return [part for part in " ".join(token.text for token in self).split(".") if part.strip()]

    def read(text: str) -> Document:
        return Document(SimpleNamespace(text=word, is_punct=not any(map(str.isalnum, word))) for word in text.split())

    for name, content in (("spacy", {"load": lambda model: read}), ("iso639", {"Lang": lambda code: SimpleNamespace(name=code)})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.multilingual")]:
        del sys.modules[name]


def test_spanish_is_judged_by_lm_evals_spanish_checkers(ifeval, spacy: None):
    _registry()
    from lm_eval.tasks.ifeval.multilingual import utils

    made = rows(120, SPANISH, SPANISH_PIECES)
    ours = compare(ifeval, made, utils.process_results, "ifeval_es")
    assert 0.1 < ours["instruction_strict"] <= ours["instruction_loose"] < 0.9
    assert {row["language"] for row in ifeval([row for row, _ in made], "ifeval_es")} == {"es"}
    german = {"check": {"instruction_ids": ["es:language:response_language"], "kwargs": [{"language": "de"}]}}
    assert [score(german, text) for text in ("Das ist ein schöner langer Tag gewesen.", "12345 ...")] == [1.0, 0.0]
    mixed = {"prompt": "x", "instruction_id_list": ["es:punctuation:no_comma", "punctuation:no_comma"], "kwargs": [{}, {}]}
    with pytest.raises(InputError, match=r"ifeval_es, row 1: .*are for checkers of several languages"):
        ifeval([mixed], "ifeval_es")


def test_what_the_spanish_checkers_need_is_said(ifeval, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    row = {"prompt": "x", "instruction_id_list": ["es:punctuation:no_comma"], "kwargs": [{}]}
    with pytest.raises(InputError, match=r"ifeval_es, row 1: es: .*spacy.*pip install 'spacy<3\.8' iso639-lang"):
        ifeval([row], "ifeval_es")


@pytest.mark.parametrize(
    ("language", "name", "kwargs", "served"),
    [
        ("de", "punctuation:no_comma", {}, True),
        ("ja", "punctuation:no_comma", {}, False),
        ("ru", "length_constraints:number_words", {"num_words": 9, "relation": "at least"}, True),
        ("zh_CN", "length_constraints:number_words", {"num_words": 9, "relation": "at least"}, False),
        ("hi", "length_constraints:number_words", {"num_words": 9, "relation": "at least"}, False),
        ("th", "detectable_format:json_format", {}, True),
        ("fr", "change_case:english_capital", {}, False),
        ("es", "detectable_format:constrained_response", {}, False),
        ("en_GB", "change_case:english_capital", {}, True),
    ],
)
def test_a_translation_is_judged_only_by_checkers_that_serve_its_language(ifeval, language: str, name: str, kwargs: dict, served: bool):
    row = {"prompt": "x", "language": language, "instruction_id_list": [name], "kwargs": [kwargs]}
    if served:
        assert ifeval([row])[0]["language"] == language
    else:
        with pytest.raises(InputError, match=f"ifeval, row 1: {name}: IFEval's checker does not serve {language}"):
            ifeval([row])


def test_every_kind_is_met_and_missed(ifeval):
    made = rows(460)
    loaded = ifeval([row for row, _ in made])
    answers = TASKS["ifeval"].verify(loaded, [{"output": answer, "finish": "stop"} for _, answer in made], None)
    seen: dict[str, set] = {}
    for row, answer in zip(loaded, answers, strict=True):
        for name, followed in zip(row["check"]["instruction_ids"], answer["loose"], strict=True):
            seen.setdefault(name, set()).add(followed)
    assert {name for name, verdicts in seen.items() if len(verdicts) == 2} >= {name for name, _ in KINDS} - {
        "startend:quotation"
    }  # no two pieces quote the rest


def test_a_language_is_a_group_and_a_bad_row_one_sentence(ifeval):
    row = {"key": 1, "prompt": "Sans virgule.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    loaded = ifeval([row, row | {"language": "fr"}])
    answers = TASKS["ifeval"].verify(loaded, [{"output": "a, b", "finish": "stop"}, {"output": "a b", "finish": "stop"}], None)
    found = {(s.metric, s.group): s.estimate.value for s in TASKS["ifeval"].score(loaded, answers, Resampling(samples=20))}
    assert (found["prompt_strict", "en"], found["prompt_strict", "fr"], found["prompt_strict", "all"]) == (0, 100, 50)
    with pytest.raises(InputError, match="row 1: instruction_id_list and kwargs"):
        ifeval([row | {"kwargs": []}])
    with pytest.raises(InputError, match=r"no_such.*is unknown to IFEval"):
        ifeval([row | {"instruction_id_list": ["no_such:thing"]}])
