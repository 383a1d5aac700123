"""The tasks around translation: figures are sacrebleu's, scipy's and the published formulas', odd replies, bad rows, a whole pass."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from scipy import stats

from evaluation import run
from evaluation.metrics import correction
from evaluation.metrics.bootstrap import Resampling
from evaluation.metrics.correlation import correlations
from evaluation.systems import better
from evaluation.tasks import AROUND, TASKS, sources
from evaluation.tasks.mt_evaluation import rating
from evaluation.tasks.ner import replied
from megatron_tower.command import load
from megatron_tower.config import EvalConfig, InputError
from tests.unit.test_evaluation_run import Pool, StandIn
from tests.unit.test_evaluation_run import score as evaluated
from tests.unit.test_tasks_benchmarks import HOW, lines
from tools.fetch_assets import _wanted

EDITS = [
    ("de", "The old house stands on a hill.", "Das alte Haus steht an einem Hügel.", "Das alte Haus steht auf einem Hügel."),
    ("de", "It has a red door and two windows.", "Es hat eine rote Tür und zwei Fenster.", "Es hat eine rote Tür und zwei Fenster."),
    ("zh", "Nobody lives there any more.", "没有人生活在那里。", "那里已经没有人居住了。"),
    ("zh", "We shall see tomorrow.", "我们明天见。", "我们明天再看吧。"),
]
APE = [{"source": s, "mt": mt, "post_edit": pe, "source_locale": "en", "target_locale": to} for to, s, mt, pe in EDITS]
RATED = [  # source, translation, MQM
    ("The house is red.", "Das Haus ist rot.", 0.0),
    ("The house is red.", "Haus rot.", -6.0),
    ("It rains.", "Es regnet.", -0.5),
    ("It rains.", "Regen fällt.", -1.0),  # within one point: people's tie
    ("He sang all night.", "Er sang die ganze Nacht.", -1.0),
    ("He sang all night.", "Er singt Nacht.", -11.0),
]
GEC = [
    {"sentence": "She go to school every days .", "corrections": ["She goes to school every day .", "She went to school every day ."]},
    {"sentence": "I likes cats .", "corrections": ["I like cats .", "I like cats ."]},
    {"sentence": "All is well here .", "corrections": ["All is well here .", "Everything is fine here ."]},
]
NER = [
    {
        "text": "Anna Berg met Anna Berg in Oslo.",
        "language": "en",
        "entities": [{"text": name, "type": kind} for name, kind in (("Anna Berg", "PER"), ("Anna Berg", "PER"), ("Oslo", "LOC"))],
    },
    {"text": "It rained.", "language": "en", "entities": []},
    {"text": "Die Bahn hält in Ulm.", "language": "de", "entities": [["Bahn", "ORG"], ["Ulm", "LOC"]], "types": ["org", "LOC"]},
]


def rated(path: Path) -> Path:
    """A TSV of MQM as WMT writes them."""
    rows = [("lp", "source", "hyp", "mqm"), *(("en-de", source, text, str(mqm)) for source, text, mqm in RATED)]
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def cfg(tmp_path: Path) -> EvalConfig:
    for name, rows in (("ape", APE), ("gec", GEC), ("ner", NER)):
        lines(tmp_path / f"{name}.jsonl", rows)
    rated(tmp_path / "mt_ranking.tsv")
    own = {"mt_ranking": "", "mt_evaluation": "mt_ranking.tsv"}  # a folder, and its file
    return EvalConfig(name="t", sources={task.name: str(tmp_path / own.get(task.name, f"{task.name}.jsonl")) for task in AROUND})


def scored(task: str, rows: Sequence[dict], outputs: Sequence[str]) -> dict[tuple[str, str, str], float]:
    answers = [{"output": output, "finish": "stop"} for output in outputs]
    if TASKS[task].verify:
        answers = TASKS[task].verify(rows, answers, None)
    found = TASKS[task].score(rows, answers, HOW)
    assert {one.task for one in found} == {task} and all(one.estimate.low <= one.estimate.high for one in found)
    return {(one.metric, one.by, one.group): one.estimate.value for one in found}


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


@pytest.mark.parametrize(
    ("reply", "entities"),
    [
        ('[{"text": "Oslo", "type": "LOC"}]', [("Oslo", "LOC")]),
        ('Here they are:\n```json\n[["Oslo", "loc"], ["Anna  Berg", "PER"]]\n```', [("Oslo", "LOC"), ("Anna Berg", "PER")]),
        ("[]", []), ("None.", None), ("", None), ('["Oslo"]', None), ('[{"text": "Oslo"}]', None),
        ('{"text": "Oslo", "type": "LOC"}', None),
        ('[{"text": "Oslo", "type": "LOC"}', None), ('[["Oslo", 3]]', None), ("] [", None),
    ],
)  # fmt: skip
def test_entities_are_read_from_one_json_list(reply: str, entities: list | None):
    assert replied(reply) == entities


def test_entities_count_by_text_and_type_as_often_as_they_stand_there(cfg: EvalConfig):
    rows = TASKS["ner"].load(cfg)
    given = [("Anna Berg", "PER"), ("Anna Berg", "PER"), ("Oslo", "PER")], [("Bahn", "ORG"), ("Ulm", "LOC"), ("Die", "LOC")]
    found = scored("ner", [*rows, rows[1]], [json.dumps(given[0]), "There are none.", json.dumps(given[1]), "[]"])
    assert found["precision", "all", "all"] == pytest.approx(100 * 4 / 6)
    assert found["recall", "all", "all"] == pytest.approx(100 * 4 / 5) and found["f1", "all", "all"] == pytest.approx(100 * 8 / 11)
    assert found["recall", "language", "en"] == found["precision", "language", "de"] == pytest.approx(200 / 3)
    assert found["f1", "type", "PER"] == 80 and found["precision", "type", "LOC"] == 50 and found["recall", "type", "ORG"] == 100
    assert found["unparsable", "all", "all"] == 25 and found["unparsable", "language", "de"] == 0
    assert "PER (person)" in TASKS["ner"].prompts(rows, True)[0] and "PER" not in TASKS["ner"].prompts(rows, True)[2]  # no such in German


def test_wikiann_is_read_in_its_published_form(tmp_path: Path):
    names = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
    tagged = [("B-LOC", "I-LOC", "O", "B-PER", "B-PER", "I-ORG"), ("O", "B-LOC", "I-LOC")]
    tokens = [["New", "York", "and", "Ann", "Bob", "UN"], ["在", "北", "京"]]
    for language, words, tags in zip(("en", "zh"), tokens, tagged, strict=True):
        row = {"tokens": words, "ner_tags": [names.index(tag) for tag in tags], "langs": [language] * len(words), "spans": []}
        lines(tmp_path / f"{language}.jsonl", [row])
    rows = TASKS["ner"].load(EvalConfig(name="t", sources={"ner": str(tmp_path)}, pairs=["en-zh_CN"]))
    assert rows[0]["text"] == "New York and Ann Bob UN"
    assert rows[0]["entities"] == [("New York", "LOC"), ("Ann", "PER"), ("Bob", "PER"), ("UN", "ORG")]
    assert rows[1]["text"] == "在北京" and rows[1]["entities"] == [("北京", "LOC")] and rows[0]["types"] == ["LOC", "ORG", "PER"]


def published_gleu(sources: list, hypotheses: list, references: list) -> float:
    """Napoles et al. 2016, sentence by sentence in float64, with the seeds of their script."""

    def ngrams(words: list[str], n: int) -> Counter:
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    scores = []
    for iteration in range(500):
        random.seed(101 * iteration)
        picks = [random.randint(0, len(of) - 1) for of in references]
        c = r = 0
        match, total = [0] * 4, [0] * 4
        for source, hypothesis, of, pick in zip(sources, hypotheses, references, picks, strict=True):
            reference = of[pick]
            c, r = c + len(hypothesis), r + len(reference)
            for n in range(1, 5):
                h, s, ref = (ngrams(words, n) for words in (hypothesis, source, reference))
                gained = sum(min(count, ref[gram]) for gram, count in h.items())
                lost = sum(min(count, s[gram]) for gram, count in h.items() if gram not in ref)
                match[n - 1] += max(gained - lost, 0)
                total[n - 1] += sum(h.values())
        precision = sum(math.log(m / t) for m, t in zip(match, total, strict=True)) / 4 if all(match) else -math.inf
        scores.append(math.exp(min(0, 1 - r / c) + precision))
    return 100 * sum(scores) / len(scores)


def test_gleu_is_the_published_formula(cfg: EvalConfig):
    rng = random.Random(2)
    words = list("abcdefghij")

    def noisy(sentence: list[str]) -> list[str]:
        return [rng.choice(words) if rng.random() < 0.15 else word for word in sentence if rng.random() > 0.05]

    truth = [[rng.choice(words) for _ in range(rng.randint(6, 15))] for _ in range(12)]
    before, after, references = [noisy(t) for t in truth], [noisy(t) for t in truth], [[t, noisy(t), noisy(t)] for t in truth]
    ours = correction.gleu(correction.gleu_statistics(before, after, references).sum(axis=0))
    assert float(ours) == pytest.approx(published_gleu(before, after, references), abs=1e-9)
    found = scored("gec", TASKS["gec"].load(cfg), [row["sentence"] for row in GEC])
    sentences = [row["sentence"].split() for row in GEC]
    copied = published_gleu(sentences, sentences, [[one.split() for one in row["corrections"]] for row in GEC])
    assert found["gleu", "all", "all"] == found["input_gleu", "all", "all"] == pytest.approx(copied)
    assert (found["unchanged", "all", "all"], found["edit_precision", "all", "all"], found["edit_f05", "all", "all"]) == (100, 100, 0)


def test_edits_are_those_of_a_minimal_alignment():
    before, fewer, other = (
        text.split(" ")
        for text in (
            "She go to the school every days .",
            "She goes to school every day .",
            "Yes she has gone to the school every days .",
        )
    )
    assert correction.edits(before, fewer) == {(1, 2, ("goes",)), (3, 4, ()), (6, 7, ("day",))}
    assert correction.edits(before, other) == {(0, 2, ("Yes", "she", "has", "gone"))}
    assert correction.edits(before, before) == set()


def test_each_sentence_has_the_reference_that_it_does_best_with(cfg: EvalConfig):
    rows = TASKS["gec"].load(cfg)
    # the second correction but for one edit, not in tokens; one edit too many in the others
    outputs = ["She went to school every days.", "I like cats now.", "All is well here now."]
    found = scored("gec", rows, outputs)
    right, wrong, missing = 2, 2, 1
    p, r = right / (right + wrong), right / (right + missing)
    assert (found["edit_precision", "all", "all"], found["edit_recall", "all", "all"]) == (pytest.approx(100 * p), pytest.approx(100 * r))
    assert found["edit_f05", "all", "all"] == pytest.approx(100 * 1.25 * p * r / (0.25 * p + r)) and found["unchanged", "all", "all"] == 0
    whole = scored("gec", rows, [row["corrections"][1] for row in rows])
    assert whole["edit_f05", "all", "all"] == 100 > whole["gleu", "all", "all"] > found["gleu", "all", "all"]
    assert whole["input_gleu", "all", "all"] < whole["gleu", "all", "all"]


def test_tokens_are_alike_whether_a_sentence_was_tokenized_or_not():
    plain, tokenized = 'She said "I don\'t know" (again).', 'She said " I do n\'t know " ( again ) .'
    assert correction.tokens(plain, True) == correction.tokens(tokenized, True) == tokenized.split()
    assert correction.tokens("我 不懂。", False) == list("我不懂。")


M2 = """S Er gehen nach Haus .
A 1 2|||R:VERB|||geht|||REQUIRED|||-NONE-|||0
A 3 4|||R:NOUN|||Hause||heim|||REQUIRED|||-NONE-|||0
A 2 4|||R:OTHER|||heim|||REQUIRED|||-NONE-|||1
A 0 0|||M:ADV|||Jetzt|||REQUIRED|||-NONE-|||1

S Alles ist ist gut .
A 1 2|||U:VERB|||-NONE-|||REQUIRED|||-NONE-|||0
A -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||1

S Nichts .
"""


def test_an_m2_file_gives_a_correction_for_each_annotator(tmp_path: Path):
    (tmp_path / "de.m2").write_text(M2, encoding="utf-8")
    rows = TASKS["gec"].load(EvalConfig(name="t", sources={"gec": str(tmp_path)}))
    assert [row["corrections"] for row in rows] == [
        ["Er geht nach Hause .", "Jetzt Er gehen heim ."],
        ["Alles ist gut .", "Alles ist ist gut ."],
        ["Nichts ."],
    ]
    assert {row["language"] for row in rows} == {"de"} and len({row["id"] for row in rows}) == 3
    assert "German sentence" in TASKS["gec"].prompts(rows, True)[0]
    for name, text, told in (("de.m2", "S a\nA 0 x|||R|||b|||0\n", "de.m2:2: an edit is"), ("conll.m2", M2, "named by its language")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=told):
            TASKS["gec"].load(EvalConfig(name="t", sources={"gec": str(tmp_path / name)}))


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
