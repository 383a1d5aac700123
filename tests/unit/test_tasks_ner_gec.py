"""Named entities and grammatical error correction: figures are the published formulas', odd replies, files in their published form."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from evaluation.metrics import correction
from evaluation.tasks import TASKS
from evaluation.tasks.ner import replied
from megatron_tower.config import EvalConfig, InputError
from tests.unit.around_cases import GEC, around_config, scored  # noqa: F401  a fixture: cfg
from tests.unit.test_tasks_benchmarks import lines


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
