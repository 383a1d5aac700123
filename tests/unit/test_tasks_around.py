"""The tasks around translation: post-edits, rankings and ratings have sacrebleu's and scipy's figures; bad rows and a whole pass of all."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from scipy import stats

from evaluation import run
from evaluation.metrics.bootstrap import Resampling
from evaluation.metrics.correlation import correlations
from evaluation.systems import better
from evaluation.tasks import AROUND, TASKS, sources
from evaluation.tasks.mt_evaluation import rating
from megatron_tower.command import load
from megatron_tower.config import EvalConfig, InputError
from tests.unit.around_cases import APE, EDITS, GEC, NER, RATED, around_config, scored  # noqa: F401  a fixture: cfg
from tests.unit.test_evaluation_run import Pool, StandIn
from tests.unit.test_evaluation_run import score as evaluated
from tests.unit.test_tasks_benchmarks import lines
from tools.fetch_assets import _wanted


def test_a_post_edits_figures_are_sacrebleus_beside_those_of_the_input(cfg: EvalConfig):
    rows = TASKS["ape"].load(cfg)
    outputs = [rows[0]["reference"], rows[1]["mt"], "那里没有人居住了。", ""]
    found = scored("ape", rows, outputs)
    for at, pair, words, ter in (
        (slice(0, 2), "en->de_DE", "13a", TER()),
        (slice(2, 4), "en->zh_CN", "zh", TER(normalized=True, asian_support=True)),
    ):
        references = [[row["reference"] for row in rows[at]]]
        for name, metric in (("chrf", CHRF(word_order=2)), ("bleu", BLEU(tokenize=words)), ("ter", ter)):
            assert found[name, "pair", pair] == pytest.approx(metric.corpus_score(outputs[at], references).score)
            before = metric.corpus_score([row["mt"] for row in rows[at]], references).score
            assert found[f"input_{name}", "pair", pair] == pytest.approx(before)
            both = [found[name, "pair", one] for one in ("en->de_DE", "en->zh_CN")]
            assert found[name, "all", "all"] == pytest.approx(np.mean(both))
    assert found["ter", "pair", "en->de_DE"] == 0 < found["input_ter", "pair", "en->de_DE"]
    assert found["unchanged", "all", "all"] == found["empty", "all", "all"] == found["input_exact_match", "all", "all"] == 25
    answers = [{"output": output, "finish": "stop"} for output in outputs]
    assert TASKS["ape"].segments(rows, answers)[0].reference == EDITS[0][3]


def test_people_s_ties_are_not_asked_and_one_couple_a_source_is(cfg: EvalConfig):
    rows = TASKS["mt_ranking"].load(cfg)
    assert [row["source"] for row in rows] == ["The house is red.", "He sang all night."]
    for row, best in zip(rows, ("Das Haus ist rot.", "Er sang die ganze Nacht."), strict=True):
        assert row["translations"]["AB".index(row["answer"])] == best
    many = [("x", f"t{i}", -5.0 * i) for i in range(6)]
    lines(Path(cfg.sources["ner"]), [{"lp": "en-de", "src": s, "mt": t, "score": score} for s, t, score in many])
    cfg.sources["mt_ranking"] = cfg.sources["ner"]
    assert len(TASKS["mt_ranking"].load(cfg)) == 1  # of fifteen couples


def test_agreement_counts_no_verdict_as_wrong(cfg: EvalConfig):
    rows = TASKS["mt_ranking"].load(cfg) * 2
    found = scored("mt_ranking", rows, [f"Translation {rows[0]['answer']} is better.", "Both are fine.", "A", "A"])
    right = 1 + sum(row["answer"] == "A" for row in rows[:2])
    assert found["accuracy", "all", "all"] == found["accuracy", "pair", "en->de_DE"] == 25 * right
    assert found["unparsable", "all", "all"] == 25
    assert found["chose_a", "all", "all"] == pytest.approx(100 * (2 + (rows[0]["answer"] == "A")) / 3)


def test_ratings_are_read_in_the_hubs_form_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The card of RicardoRei/wmt-mqm-human-evaluation names these columns."""
    row = {"lp": "en-ru", "ref": "r", "system": "s", "annotators": 1, "domain": "news", "year": 2022}
    hub = [row | {"src": "It rains.", "mt": mt, "score": score} for mt, score in (("Идёт дождь.", 0.0), ("Дождь.", -4.0))]
    monkeypatch.setattr(sources, "fetched", lambda part: hub if part.hub == "RicardoRei/wmt-mqm-human-evaluation" else [])
    cfg = EvalConfig(name="t", assets=str(tmp_path))
    [couple] = TASKS["mt_ranking"].load(cfg)
    assert couple["target_locale"] == "ru_RU" and len(TASKS["mt_evaluation"].load(cfg)) == 2
    hub[1] |= {"mt": " "}
    with pytest.raises(InputError, match="mt_evaluation, row 2: mt is empty"):
        TASKS["mt_evaluation"].load(cfg)


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("85", 85), (" 85\n", 85), ("Score: 85", 85), ("**Score:** 85/100", 85), ("I'd give it 85 out of 100.", 85), ("0", 0),
        ("On a scale of 0 to 100, I rate it 92.5.", 92.5), ("Final score (0-100): 70", 70), ("85 %", 85), ("92,5", 92.5),
        ("There are 2 errors. Rating: 40", 40), ("Score: 100", 100), ("100/100", 100), ("Score: 60. So the score is 60.", 60),
        ("", None), ("perfect", None), ("101", None), ("-5", None), ("Score: -5", None), ("8.5/10", None), ("between 70 and 80", None),
        ("Score: 60, or rather score: 70", None), ("1,000", None),
    ],
)  # fmt: skip
def test_a_rating_is_one_number_on_the_scale(reply: str, number: float | None):
    assert rating(reply) == number


def test_correlations_are_scipys_and_a_reply_without_number_counts_as_the_mean(cfg: EvalConfig):
    rows = TASKS["mt_evaluation"].load(cfg)
    assert [row["human"] for row in rows] == [mqm for *_, mqm in RATED] and (rows[0]["shown"], rows[5]["shown"]) == (100, 0)
    found = scored("mt_evaluation", rows, ["90", "30", "no idea", "80", "Score: 70", "80/100"])
    ours, people = [90, 30, 70, 80, 70, 80], [mqm for *_, mqm in RATED]  # 70: the mean of the other five
    for name, known in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        assert found[name, "all", "all"] == found[name, "pair", "en->de_DE"] == pytest.approx(known(ours, people).statistic)
    assert found["unparsable", "all", "all"] == pytest.approx(100 / 6)
    mute = scored("mt_evaluation", rows, ["?"] * 6)
    assert mute["pearson", "all", "all"] == mute["kendall", "all", "all"] == 0 and mute["unparsable", "all", "all"] == 100


def test_correlations_intervals_are_of_resampled_segments():
    rng = np.random.default_rng(5)
    people = rng.normal(size=(2, 80))
    groups = {name: np.stack([one + rng.normal(size=80), one], axis=1) for name, one in zip("ab", people, strict=True)}
    found = correlations(groups, Resampling(samples=200, seed=1))
    for kind in ("pearson", "spearman", "kendall"):
        both = [found[kind, name] for name in "ab"]
        assert all(one.low < one.value < one.high and one.count == 80 for one in both)
        mean = found[kind, "all"]
        assert mean.value == pytest.approx(np.mean([one.value for one in both])) and mean.count == 160
        assert mean.high - mean.low < min(one.high - one.low for one in both)  # of two pairs more is known than of one
    r, fisher = found["pearson", "a"], np.arctanh(found["pearson", "a"].value)
    assert (r.low, r.high) == pytest.approx((np.tanh(fisher - 1.96 / 77**0.5), np.tanh(fisher + 1.96 / 77**0.5)), abs=0.07)


BAD = [
    ("ape", APE[0] | {"mt": ""}, 'ape, row 2: "mt" must be a text'),
    ("ape", APE[0] | {"target_locale": "xx"}, "ape, row 2: language xx is unknown"),
    ("gec", GEC[0] | {"corrections": []}, 'gec, row 2: "sentence" must be a text and "corrections"'),
    ("gec", GEC[0] | {"corrections": ["She goes.", None]}, "gec, row 2"),
    ("gec", GEC[0] | {"language": "tlh"}, "gec, row 2: language tlh is unknown"),
    ("ner", NER[0] | {"text": "Nobody met in Oslo."}, "ner, row 2: the entity 'Anna Berg' does not stand in the text"),
    ("ner", NER[0] | {"entities": {"Oslo": "LOC"}}, 'ner, row 2: "text" must be a text and "entities" a list'),
    ("ner", {"tokens": ["a", "b"], "ner_tags": ["O"], "language": "en"}, "ner, row 2: tokens and ner_tags must be two lists"),
    ("ner", {"tokens": ["a"], "ner_tags": [7], "language": "en"}, "ner, row 2: ner_tags as numbers are WikiANN's"),
    ("ner", NER[0] | {"types": "PER"}, 'ner, row 2: "types" must be a list of names'),
    ("ner", {"text": "a", "entities": []}, 'ner, row 2: "language" must be a text'),
    ("mt_evaluation", {"lp": "en-de", "src": "a", "mt": "b", "score": "good"}, "mt_evaluation.jsonl:2: score is 'good', no number"),
]


@pytest.mark.parametrize(("task", "row", "told"), BAD)
def test_a_bad_row_is_one_sentence_with_its_place(tmp_path: Path, task: str, row: dict, told: str):
    good = {"ape": APE, "gec": GEC, "ner": NER, "mt_evaluation": [{"lp": "en-de", "src": "a", "mt": "b", "score": 1}]}[task][0]
    lines(tmp_path / f"{task}.jsonl", [good, row])
    with pytest.raises(InputError) as error:
        TASKS[task].load(EvalConfig(name="t", sources={task: str(tmp_path)}))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_is_told(tmp_path: Path):
    lines(tmp_path / "alike.jsonl", [{"lp": "en-de", "src": "a", "mt": mt, "score": 1} for mt in "bc"])
    for task, place, told in (
        ("mt_ranking", tmp_path, "holds neither mt_ranking.tsv nor mt_ranking.jsonl"),
        ("mt_ranking", tmp_path / "alike.jsonl", "no source has two translations that people scored apart"),
        ("gec", tmp_path / "en.m2", "en.m2 is missing"),
    ):
        with pytest.raises(InputError, match=told):
            TASKS[task].load(EvalConfig(name="t", sources={task: str(place)}))
    with pytest.raises(InputError, match=r"ape reads your own data: set \+eval.sources.ape"):
        TASKS["ape"].load(EvalConfig(name="t", assets=str(tmp_path)))


ANSWER = {
    "ape": lambda row: row["reference"],
    "gec": lambda row: row["corrections"][0],
    "ner": lambda row: json.dumps([{"text": text, "type": kind} for text, kind in row["entities"]], ensure_ascii=False),
    "mt_ranking": lambda row: row["answer"],
    "mt_evaluation": lambda row: str(row["shown"]),
}


@pytest.mark.parametrize("name", ANSWER)
def test_a_base_model_sees_other_rows_answered_and_its_own_left_open(cfg: EvalConfig, name: str):
    task = TASKS[name]
    rows = task.load(cfg)
    opening = task.opening or (lambda one: task.instruction(one).rstrip())
    for row, prompt in zip(rows, task.prompts(rows, chat=False), strict=True):
        *shown, last = prompt.split("\n\n")
        assert last == opening(row) and last.endswith(":") and row[task.text] in last
        others = [one for one in rows if one[task.text] != row[task.text]]
        answered = [f"{opening(one)} {ANSWER[name](one)}" for one in others]
        assert all(one in answered for one in shown) and (shown or name in ("ape", "ner"))


def test_the_board_knows_which_way_is_better():
    higher = ("chrf", "accuracy", "kendall", "pearson", "spearman", "f1", "precision", "recall", "gleu", "edit_f05")
    assert {better(name) for name in higher} == {1} and {better(name) for name in ("ter", "unparsable", "truncated", "empty")} == {-1}
    assert {better(name) for name in ("input_chrf", "input_ter", "input_gleu", "unchanged", "chose_a")} == {0}


def test_the_published_parts_are_among_the_assets():
    wanted = _wanted(load(["eval.tasks=[ape,gec,ner,mt_ranking,mt_evaluation]"]))
    assert set(wanted) == {"gec", "ner", "mt_ranking", "mt_evaluation"}  # ape reads one's own rows


class Expert(StandIn):
    """Answers each prompt as it is told."""

    def __init__(self, known: dict[str, str]) -> None:
        super().__init__()
        self.known = known

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        return [self.known[prompt] for prompt in prompts]


def test_from_files_to_scores(cfg: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    known = {}
    for task in AROUND:
        rows = task.load(cfg)
        known |= dict(zip(task.prompts(rows, chat=True), map(ANSWER[task.name], rows), strict=True))
    monkeypatch.setattr(run, "open_generator", lambda cfg, subject: (Expert(known), {"name": "expert"}))
    monkeypatch.setattr("megatron_tower.rewards.pool.VerifierPool", partial(Pool, []))
    words = [f"+eval.sources.{name}={place}" for name, place in cfg.sources.items()]
    words += [f"eval.tasks=[{','.join(ANSWER)}]", "data.folder=nowhere", f"eval.checkpoint={tmp_path}", "eval.bootstrap_samples=50"]
    evaluated(load(words))
    result = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    found = {(s["task"], s["metric"]): s["value"] for s in result["scores"] if s["by"] == "all"}
    perfect = {("ape", "chrf"): 100, ("ape", "ter"): 0, ("gec", "edit_f05"): 100, ("ner", "f1"): 100, ("mt_ranking", "accuracy"): 100}
    assert {key: found[key] for key in perfect} == pytest.approx(perfect)
    assert found["mt_evaluation", "pearson"] > 0.99
    assert {found[task, "unparsable"] for task in ("ner", "mt_ranking", "mt_evaluation")} == {0}
    assert result["items"] == {"gec": 3, "ner": 3, "ape": 4, "mt_ranking": 2, "mt_evaluation": 6}
    assert all("{" in text["example"] for text in result["prompts"].values()) and len(result["prompts"]) == 5
    kept = [json.loads(line) for line in (tmp_path / "evaluation" / "generations.jsonl").read_text().splitlines()]
    assert {row["choice"] for row in kept if row["task"] == "mt_ranking"} <= {"A", "B"}
    assert {row["rating"] for row in kept if row["task"] == "mt_evaluation"} >= {0, 100}
