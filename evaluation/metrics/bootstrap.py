"""Point value and percentile interval of any metric that is a function of sums over segments.

A metric is two things: what each segment contributes, `statistics` [segments, k], and `value`, which turns sums [..., k] into
scores [...]. Resampling segments is then one matrix product, so a thousand resamples of corpus-level chrF++ take milliseconds.
Leaves out: paired comparison of two systems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Value = Callable[[NDArray], NDArray]
CHUNK = 4_000_000  # resampled segments held at once: bounds memory, not the result


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: `samples` draws with replacement, central `confidence` of them, from a fixed seed."""

    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A score with its interval, and the number of segments behind it."""

    value: float
    low: float
    high: float
    count: int

    def overlaps(self, other: "Estimate") -> bool:
        return self.low <= other.high and other.low <= self.high


def estimate(strata: Sequence[NDArray], value: Value, how: Resampling) -> Estimate:
    """Mean over strata of `value(sum of the stratum's statistics)`: one stratum is a plain corpus score, several a macro average.

    strata: arrays [segments, k]. Each stratum is resampled within itself (Efron & Tibshirani 1993, percentile interval).
    """
    generator = np.random.default_rng(how.seed)
    point = float(np.mean([value(s.sum(axis=0)) for s in strata]))
    resampled = np.mean([_resampled(s.astype(np.float64), value, how.samples, generator) for s in strata], axis=0)
    tail = 50 * (1 - how.confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(point, float(low), float(high), sum(len(s) for s in strata))


def _resampled(statistics: NDArray, value: Value, samples: int, generator: np.random.Generator) -> NDArray:
    """Scores of `samples` resamples of one stratum, [samples]."""
    segments = len(statistics)
    scores = []
    for chunk in np.array_split(np.arange(samples), -(-samples * segments // CHUNK)):
        drawn = generator.integers(segments, size=(len(chunk), segments)) + segments * np.arange(len(chunk))[:, None]
        times = np.bincount(drawn.ravel(), minlength=len(chunk) * segments).reshape(len(chunk), segments)
        scores.append(value(times @ statistics))
    return np.concatenate(scores)


def ratio(sums: NDArray) -> NDArray:
    """[..., 2] (numerator, denominator) -> their quotient: bits per byte."""
    return sums[..., 0] / sums[..., 1]


def percentage(hits: Sequence[bool], how: Resampling) -> Estimate:
    """Share of true in %.

    Where all segments agree the bootstrap has no spread, which would claim a certainty that isn't there:
    the open end is then the exact binomial bound (Clopper & Pearson 1934).
    """
    found = np.array(hits, dtype=np.float64)
    got = estimate([np.stack([found, np.ones_like(found)], axis=1)], lambda sums: 100 * ratio(sums), how)
    if got.low < got.high:
        return got
    bound = 100 * (1 - (0.5 * (1 - how.confidence)) ** (1 / got.count))
    return Estimate(got.value, got.low - bound, got.high, got.count) if got.value else Estimate(got.value, got.low, bound, got.count)
