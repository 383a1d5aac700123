"""The win rate that answers of equal length would have (AlpacaEval 2, arXiv 2404.04475).

    logit P(win) = level + slope * x,   x = tanh(difference in characters / its standard deviation);   the score: P(win) at x = 0

Fitted to one model's verdicts against one baseline, by maximum likelihood with a normal prior on the slope. Leaves out of AlpacaEval 2:
the term of each instruction's difficulty, which takes many models' verdicts to fit, and the choice of the prior by cross-validation.
Where one side wrote nearly all the longer answers, equal length is extrapolated to; the interval is wide then.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.bootstrap import Estimate, Resampling, estimate

PRIOR = np.array([1e-6, 0.1])  # 1 / variance of level and slope: both wide; they keep finite what verdicts alone would not
STEPS = 50


def relative_lengths(differences: Sequence[float], languages: Sequence[str]) -> NDArray:
    """x of each answer [answers]: a language's differences by their own standard deviation, since scripts differ in characters."""
    found, names = np.array(differences, dtype=np.float64), np.array(languages)
    for name in set(languages):
        found[names == name] /= found[names == name].std() or 1
    return np.tanh(found)


def length_controlled(wins: Sequence[float], lengths: NDArray, clusters: Sequence[str], how: Resampling) -> Estimate:
    """In %. wins: from 0 to 1, ties a half; lengths: of `relative_lengths`; the interval resamples clusters."""
    names, cluster = np.unique(clusters, return_inverse=True)
    verdicts = np.array(wins, dtype=np.float64)

    def value(times: NDArray) -> NDArray:
        """times [..., clusters]: how often each was drawn."""
        fitted = [at_equal_length(verdicts, lengths, drawn[cluster]) for drawn in times.reshape(-1, len(names))]
        return 100 * np.array(fitted).reshape(times.shape[:-1])

    return replace(estimate([np.eye(len(names))], value, how), count=len(verdicts))


def at_equal_length(wins: NDArray, lengths: NDArray, weights: NDArray) -> float:
    """P(win) at x = 0 of the fit to weighted verdicts [answers], by Newton's method."""
    features, beta = np.stack([np.ones_like(lengths), lengths]), np.zeros(2)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-beta @ features))
        gradient = features @ (weights * (wins - p)) - PRIOR * beta
        step = np.linalg.solve(features * (weights * p * (1 - p)) @ features.T + np.diag(PRIOR), gradient)
        beta += step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-beta[0])))
