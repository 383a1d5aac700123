"""Metrics against sacrebleu's own scores and values worked out by hand; intervals; n-gram models; rates."""

import itertools
import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from evaluation.metrics.bootstrap import Resampling, counted, difference, estimate, mean, percent, percentage, ratio
from evaluation.metrics.ngram import NgramModels
from evaluation.metrics.translation import bleu, bleu_statistics, chrf, chrf_statistics, is_copied, is_wrong_language, plain

REFERENCES = ["Der Hund schläft unter dem großen Tisch.", "12. März 2024", "Die Schule beginnt um acht Uhr.", "Ja"]
HYPOTHESES = {
    "near": ["Der Hund schläft unter einem großen Tisch.", "12. März 2024", "Die Schule beginnt gegen acht.", "Ja"],
    "far": ["The dog sleeps", "x", "Schule", "nein danke"],
    "empty": ["", "", "", ""],
    "half empty": ["", "12. März 2024", "", "Ja, ja, ja"],
    "scattered": ["Tisch dem unter schläft Hund Der dort", "2024 März 12.", "acht um Uhr beginnt Schule", "Ja"],  # no order but the first
    "perfect": REFERENCES,
}


@pytest.mark.parametrize("name", HYPOTHESES)
def test_corpus_scores_equal_sacrebleu(name: str) -> None:
    found = HYPOTHESES[name]
    statistics, signature = chrf_statistics(found, REFERENCES)
    assert chrf(statistics.sum(axis=0)) == pytest.approx(CHRF(word_order=2).corpus_score(found, [REFERENCES]).score, abs=1e-9)
    assert "nw:2" in signature
    statistics, signature = bleu_statistics(found, REFERENCES, "de_DE")
    assert bleu(statistics.sum(axis=0)) == pytest.approx(BLEU().corpus_score(found, [REFERENCES]).score, abs=1e-9)
    assert "tok:13a" in signature


def test_every_subset_of_segments_equals_sacrebleu() -> None:
    """The bootstrap scores sums over other multisets of segments than the corpus: those must be right too."""
    found = HYPOTHESES["near"]
    characters, words = chrf_statistics(found, REFERENCES)[0], bleu_statistics(found, REFERENCES, "de_DE")[0]
    for drawn in itertools.combinations_with_replacement(range(4), 3):
        own, theirs = [found[i] for i in drawn], [[REFERENCES[i] for i in drawn]]
        assert chrf(characters[list(drawn)].sum(axis=0)) == pytest.approx(CHRF(word_order=2).corpus_score(own, theirs).score, abs=1e-9)
        assert bleu(words[list(drawn)].sum(axis=0)) == pytest.approx(BLEU().corpus_score(own, theirs).score, abs=1e-9)


@pytest.mark.parametrize(
    ("locale", "text", "tokenizer"),
    [
        ("zh_CN", "我们今天去学校上课。", "zh"),
        ("ja_JP", "今日は学校へ行きます。", "ja-mecab"),
        ("ko_KR", "오늘 학교에 갑니다.", "ko-mecab"),
    ],
)
def test_bleu_splits_words_as_the_target_language_needs(locale: str, text: str, tokenizer: str) -> None:
    statistics, signature = bleu_statistics([text], [text], locale)
    assert bleu(statistics.sum(axis=0)) == pytest.approx(100)
    assert f"tok:{tokenizer}" in signature


def test_chrf_by_hand() -> None:
    """ "ab" against "abc": character orders 1 and 2 match 2/2, 2/3 and 1/1, 1/2; order 3 and the word differ."""
    statistics, _ = chrf_statistics(["ab"], ["abc"])
    precision, recall = (1 + 1 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3  # orders on both sides: characters 1, 2 and the word
    assert chrf(statistics.sum(axis=0)) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % intervals of a mean over 80 segments, 300 times: the truth is inside in 90 to 99 % of them."""
    draws = np.random.default_rng(7)
    inside = 0
    for trial in range(300):
        sample = np.stack([draws.exponential(2.0, 80), np.ones(80)], axis=1)
        found = estimate([sample], ratio, Resampling(samples=400, seed=trial))
        inside += found.low <= 2.0 <= found.high
    assert 0.90 <= inside / 300 <= 0.99


def test_interval_does_not_depend_on_the_chunks_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, _ = chrf_statistics([f"{a} {i}" for i in range(9) for a in HYPOTHESES["near"]], REFERENCES * 9)
    first = estimate([statistics], chrf, Resampling())
    assert first == estimate([statistics], chrf, Resampling()) != estimate([statistics], chrf, Resampling(seed=1))
    assert first.low < first.value < first.high
    monkeypatch.setattr("evaluation.metrics.bootstrap.CHUNK", 100)
    assert estimate([statistics], chrf, Resampling()) == first


def test_several_strata_are_a_macro_average() -> None:
    small, large = np.array([[1.0, 1.0]] * 3), np.array([[0.0, 1.0], [1.0, 1.0]] * 50)
    found = estimate([small, large], ratio, Resampling())
    assert found.value == pytest.approx(0.75) and found.count == 103
    assert 0.65 < found.low < 0.75 < found.high < 0.85


def test_percentage_without_a_hit_still_has_an_upper_bound() -> None:
    none, every = percentage([False] * 50, Resampling()), percentage([True] * 50, Resampling())
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(100 * (1 - 0.025 ** (1 / 50)))
    assert (every.value, every.high) == (100, 100) and every.low == pytest.approx(100 - none.high)
    some = percentage([True, False] * 25, Resampling())
    assert some.value == 50 and 33 < some.low < 40 and 60 < some.high < 67


def test_percentage_of_values_that_all_agree_between_has_room_on_both_sides() -> None:
    found = percentage([0.5] * 50, Resampling())
    bound = 100 * (1 - 0.025 ** (1 / 50))
    assert (found.value, found.low, found.high) == (50, pytest.approx(50 - bound), pytest.approx(50 + bound))


def test_a_difference_on_the_same_items_sees_what_two_intervals_do_not() -> None:
    """Items of very different difficulty, each a little better afterwards."""
    draws = np.random.default_rng(3)
    before = draws.uniform(0, 1, 60)
    after = before + draws.normal(0.04, 0.05, 60)
    found = difference([counted(before)], [counted(after)], ratio, Resampling(2000))
    assert found.value == pytest.approx((after - before).mean()) and found.count == 60
    spread = 1.96 * (after - before).std() / math.sqrt(60)
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1) and found.low > 0
    assert mean(before, Resampling()).high > mean(after, Resampling()).low
    back = difference([counted(after)], [counted(before)], ratio, Resampling(2000))
    assert back.value == pytest.approx(-found.value)


def test_a_difference_leaves_out_what_one_side_does_not_know() -> None:
    before, after = counted([0.0, 1.0, None, 0.5]), counted([1.0, None, 1.0, 0.5])
    found = difference([before], [after], percent, Resampling())
    assert found.value == pytest.approx(50) and found.count == 2  # the first and the last
    assert difference([before[1:3]], [after[1:3]], percent, Resampling()) is None
    assert difference([before, before[1:3]], [after, after[1:3]], percent, Resampling()) == found  # no stratum of nothing


def test_ngram_probabilities_sum_to_one_in_every_context() -> None:
    size, bos, eos = 7, 0, 1
    random = np.random.default_rng(3)
    models = NgramModels.fit([random.integers(2, size, 12).tolist() for _ in range(9)], size, bos, eos)
    for context in [[2], [3, 4], [4, 4], [6, 2], [3, 0]]:
        both = np.array([[p[len(context)] for p in models.probabilities([*context, word])] for word in range(size)])
        assert both.sum(axis=0) == pytest.approx([1, 1]) and (both > 0).all()


def test_ngram_example_by_hand() -> None:
    """Documents "2 3" and "2 2" over 4 tokens (0 BOS, 1 EOS), worked through by the formulas."""
    models = NgramModels.fit([[2, 3], [2, 2]], 4, 0, 1)
    # unigram: counts EOS 2, token 2 three times, token 3 once; n1 = n2 = 1, so D = 1/3; N = 6, three types
    unigram = [(0 + 1 / 4) / 6, (2 - 1 / 3 + 1 / 4) / 6, (3 - 1 / 3 + 1 / 4) / 6, (1 - 1 / 3 + 1 / 4) / 6]
    assert models.unigram.table == pytest.approx(unigram)
    # trigrams: (0 0 2) twice; (0 2 3), (2 3 1), (0 2 2), (2 2 1) once each: D = 4 / 6
    # bigrams by contexts in front: (0 2), (2 3), (3 1), (2 2), (2 1), one each: no twice, so D = 1/2
    # continuation: token 1 after {3, 2}, 2 after {0, 2}, 3 after {2}: n1 = 1, n2 = 2, D = 1/5; total 5, three types
    lowest = (1 - 1 / 5 + 3 / 5 / 4) / 5  # of token 3
    bigram = (1 - 1 / 2) / 3 + (1 / 2 * 3 / 3) * lowest  # p(3 | 2): contexts of 2 are 3, 2, 1
    trigram = (1 - 2 / 3) / 2 + (2 / 3 * 2 / 2) * bigram  # p(3 | 0 2): seen once of two, two types
    assert models.probabilities([2, 3])[1][1] == pytest.approx(trigram)
    below = (1 - 1 / 2) / 3 + 1 / 2 * (2 - 1 / 5 + 3 / 5 / 4) / 5  # p(1 | 2), the trigram context (3 2) is unseen
    assert models.probabilities([3, 2])[1][2] == pytest.approx(below)
    assert models.bits([2])[0] == pytest.approx(-math.log2(unigram[2]) - math.log2(unigram[1]))


def test_lower_orders_count_different_histories_not_occurrences() -> None:
    """Bigram (3 4) follows 2 and 5, (3 6) follows only 5, twice: they count 2 and 1."""
    models = NgramModels.fit([[2, 3, 4], [5, 3, 4], [5, 3, 6], [5, 3, 6]], 7, 0, 1)
    # bigrams (0 2) (0 5) (2 3) (5 3) (4 1) (6 1) (3 6) once, (3 4) twice: D = 7 / 9; words 2, 4, 5, 6 once, 1 and 3 twice: D = 4 / 8
    lowest = (1 - 1 / 2 + 1 / 2 * 6 / 7) / 8
    assert models.probabilities([4, 3, 4])[1][2] == pytest.approx((2 - 7 / 9) / 3 + 7 / 9 * 2 / 3 * lowest)


def test_ngram_frames_documents_once() -> None:
    """A stored document may carry its BOS and EOS: the model is the same."""
    bare, framed = [[2, 3, 4], [5, 2]], [[0, 2, 3, 4, 1], [0, 5, 2, 1]]
    one, other = (NgramModels.fit(documents, 6, 0, 1) for documents in (bare, framed))
    assert one.bits([2, 3, 5]) == other.bits([2, 3, 5])


def test_trigram_beats_unigram_where_order_matters() -> None:
    models = NgramModels.fit([[2, 3, 4, 5] * 5] * 20, 6, 0, 1)
    unigram, trigram = models.bits([2, 3, 4, 5] * 3)
    assert trigram < 0.2 * unigram


def test_rates() -> None:
    assert plain("1 234,50 €") == "1 234,50 €" and plain("e\u0301 ") == "é"
    assert (
        is_copied("Monday ", "Monday", "Montag") and not is_copied("Taxi", "Taxi", "Taxi") and not is_copied("Montag", "Monday", "Montag")
    )
    german = "Die Schüler lernen heute in der Schule."
    assert is_wrong_language("The pupils are learning at school today.", german, "de_DE") is True
    assert is_wrong_language("Die Schüler sind heute in der Schule.", german, "de_DE") is False
    assert is_wrong_language("Hello", german, "de_DE") is None  # too short to tell
    assert is_wrong_language("The pupils are learning at school today.", "Kuala Lumpur / Putrajaya (KUL)", "fi_FI") is None
