"""Correlation with people's scores a segment: Pearson's r, Spearman's rho and Kendall's tau-b, with percentile intervals.

They are no functions of sums, so segments are drawn and each resample is correlated anew. Undefined where one side never varies: 0.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.bootstrap import Estimate, Resampling


def pearson(ours: NDArray, theirs: NDArray) -> float:
    return float(np.corrcoef(ours, theirs)[0, 1])


def spearman(ours: NDArray, theirs: NDArray) -> float:
    from scipy.stats import rankdata  # here, since it takes seconds

    return pearson(rankdata(ours), rankdata(theirs))


def kendall(ours: NDArray, theirs: NDArray) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(ours, theirs).statistic)


KINDS: dict[str, Callable[[NDArray, NDArray], float]] = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def correlations(groups: Mapping[str, NDArray], how: Resampling) -> dict[tuple[str, str], Estimate]:
    """(kind, group) -> estimate, and (kind, "all"), the mean over groups. groups: name -> [segments, 2] (ours, people's)."""
    generator, tail = np.random.default_rng(how.seed), 50 * (1 - how.confidence)
    points = {name: _all_kinds(pairs) for name, pairs in groups.items()}  # [kinds]
    drawn = {
        name: np.array([_all_kinds(pairs[generator.integers(len(pairs), size=len(pairs))]) for _ in range(how.samples)])
        for name, pairs in groups.items()
    }
    points["all"], drawn["all"] = np.mean([*points.values()], axis=0), np.mean([*drawn.values()], axis=0)
    counts = {name: len(pairs) for name, pairs in groups.items()}
    counts["all"] = sum(counts.values())
    found = {}
    for name, values in points.items():
        low, high = np.percentile(drawn[name], [tail, 100 - tail], axis=0)
        for at, kind in enumerate(KINDS):
            found[kind, name] = Estimate(float(values[at]), float(low[at]), float(high[at]), counts[name])
    return found


def _all_kinds(pairs: NDArray) -> NDArray:
    varies = (pairs != pairs[0]).any(axis=0).all()
    return np.array([kind(*pairs.T) for kind in KINDS.values()]) if varies else np.zeros(len(KINDS))
