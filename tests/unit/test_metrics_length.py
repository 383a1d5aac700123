"""The length-controlled win rate: the published formula computed naively, what it corrects, and where there is no answer."""

import numpy as np
import pytest
from scipy.optimize import minimize

from evaluation.judge import Compared, win_rates
from evaluation.judging import Reply
from evaluation.metrics.bootstrap import Resampling
from evaluation.metrics.length import at_equal_length, length_controlled, relative_lengths

RNG = np.random.default_rng(3)
HOW = Resampling(samples=200)


def naive(wins: list[float], lengths: list[float]) -> float:
    """P(win) at equal length by a general minimiser of the penalised likelihood, verdict by verdict."""

    def loss(beta: np.ndarray) -> float:
        total = 0.5 * (1e-6 * beta[0] ** 2 + 0.1 * beta[1] ** 2)
        for win, length in zip(wins, lengths, strict=True):
            logit = beta[0] + beta[1] * length
            total += win * np.log1p(np.exp(-logit)) + (1 - win) * np.log1p(np.exp(logit))
        return total

    return 1 / (1 + np.exp(-minimize(loss, np.zeros(2), tol=1e-12).x[0]))


def test_fit_is_the_naive_one_and_a_weight_is_a_repetition() -> None:
    wins, lengths, times = RNG.choice([0, 0.25, 0.5, 0.75, 1], 40), RNG.uniform(-1, 1, 40), RNG.integers(0, 4, 40)
    assert at_equal_length(wins, lengths, np.ones(40)) == pytest.approx(naive(wins, lengths), abs=1e-6)
    repeated = naive(np.repeat(wins, times), np.repeat(lengths, times))
    assert at_equal_length(wins, lengths, times) == pytest.approx(repeated, abs=1e-6)


def test_verdicts_that_length_alone_explains_are_a_draw() -> None:
    differences = RNG.normal(1, 1, 2000)  # mostly the longer one
    lengths = relative_lengths(differences, ["en"] * 2000)
    by_length, by_worth = RNG.random(2000) < 1 / (1 + np.exp(-3 * lengths)), RNG.random(2000) < 0.7
    clusters = [str(i) for i in range(2000)]
    found = length_controlled(by_length, lengths, clusters, HOW)
    assert by_length.mean() > 0.75 and found.low < 50 < found.high and found.high - found.low < 12 and found.count == 2000
    assert length_controlled(by_worth, lengths, clusters, HOW).value == pytest.approx(100 * by_worth.mean(), abs=3)


def test_lengths_are_relative_within_a_language() -> None:
    found = relative_lengths([1, 3, 100, 300, 7], ["ja", "ja", "de", "de", "fr"])
    assert found == pytest.approx(np.tanh([1, 3, 1, 3, 7]))


def test_what_resampling_meets_has_a_finite_answer() -> None:
    lengths = np.array([-0.5, 0.5, 0.2, 0.9])
    assert at_equal_length(np.ones(4), lengths, np.ones(4)) == pytest.approx(1, abs=1e-3)
    separated = at_equal_length(np.array([0, 1, 1, 1]), lengths, np.ones(4))
    assert separated == pytest.approx(naive([0, 1, 1, 1], lengths), abs=1e-6)


def test_among_a_judges_scores() -> None:
    def scores(lengths: list[int], verdicts: list[int], languages: int = 1) -> dict:
        compared = [
            Compared({"task": "t", "id": f"{q}/{n}", "question_id": str(q), "language": str(n)}, "a" * length, "b", (Reply(v), Reply(v)))
            for q, (length, v) in enumerate(zip(lengths, verdicts, strict=True))
            for n in range(languages)
        ]
        return {(s.metric, s.by, s.group): s.estimate for s in win_rates(compared, "t", "", HOW)}

    lengths, verdicts = [1, 20, 9, 4] * 10, [-1, 1, 1, -1, 1, -1, 0, 1] * 5
    found = scores(lengths, verdicts)["lc_win_rate", "all", "all"]
    expected = naive([(v + 1) / 2 for v in verdicts], relative_lengths([n - 1 for n in lengths], ["0"] * 40))
    assert found.value == pytest.approx(100 * expected, abs=1e-4) and found.low < found.value < found.high
    many = scores(lengths, verdicts, languages=5)
    assert many["lc_win_rate", "all", "all"].count == 200 and ("lc_win_rate", "language", "3") in many
    widths = [one.high - one.low for one in (found, many["lc_win_rate", "all", "all"])]
    assert widths[1] > 0.8 * widths[0]  # a question's languages are drawn together
    assert not [key for key in many if key[0] == "lc_win_rate" and key[1] == "length"]
    assert ("lc_win_rate", "all", "all") not in scores([5] * 40, verdicts) | scores(lengths, [1] * 40)
