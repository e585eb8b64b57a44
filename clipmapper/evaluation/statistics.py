"""Percentile bootstrap intervals over samples (Efron & Tibshirani 1993, chapter 13).

Missing values are an error everywhere: a NaN means that a sample had no score, and whether it may be left out
is for the caller to decide (and to report), not for an average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

# Entries of the resampling matrix held at a time (8 MB a copy), so memory does not grow with resamples.
_CHUNK_ENTRIES = 2**20


@dataclass(frozen=True)
class Interval:
    """A mean over samples and the ends of its bootstrap confidence interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_intervals(
    values: Float[np.ndarray, "samples statistics"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """One `Interval` a column, all from the same resamples of the rows.

    A row is one sample with all its statistics, so resampling rows keeps whatever pairing there is between
    the columns. One sample gives an interval of width 0: it says nothing about the spread. Raises ValueError
    without samples, for values that are not finite, and for a confidence outside (0, 1).
    """
    _check(values, confidence, resamples)
    # Relative to the first sample: rounding scales with the spread, and equal values give exactly width 0.
    origin = values[0].astype(np.float64)
    relative = values.astype(np.float64) - origin
    means = resampled_means(relative, resamples, seed)
    tail = (1 - confidence) / 2
    mean = origin + relative.mean(axis=0)
    low, high = origin + np.quantile(means, [tail, 1 - tail], axis=0)
    return [Interval(float(m), float(lo), float(hi)) for m, lo, hi in zip(mean, low, high, strict=True)]


def bootstrap_score(
    values: Float[np.ndarray, "samples statistics"],
    score: Callable[[Float[np.ndarray, "*sets statistics"]], Any],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of a ``score`` that is a function of means over samples, such as BLEU of a corpus.

    ``score`` gives one number for each row of means. The resamples are those of :func:`bootstrap_intervals`,
    and so are the errors.
    """
    _check(values, confidence, resamples)
    values = values.astype(np.float64)
    tail = (1 - confidence) / 2
    low, high = np.quantile(score(resampled_means(values, resamples, seed)), [tail, 1 - tail])
    return Interval(float(score(values.mean(axis=0))), float(low), float(high))


def _check(values: Float[np.ndarray, "samples statistics"], confidence: float, resamples: int) -> None:
    if len(values) == 0:
        raise ValueError("an interval needs at least one sample")
    if not np.isfinite(values).all():
        raise ValueError("an interval needs finite values: leave out the samples without a score, and say so")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")


def resampled_means(
    values: Float[np.ndarray, "samples statistics"], resamples: int, seed: int
) -> Float[np.ndarray, "resamples statistics"]:
    """Means over ``resamples`` sets of samples, each drawn with replacement; all columns of the same sets."""
    samples, statistics = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, statistics))
    chunk = max(1, _CHUNK_ENTRIES // samples)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, samples, (rows, samples))
        # How often each sample was drawn: then all statistics of a chunk are one matrix product.
        flat = (drawn + samples * np.arange(rows)[:, None]).ravel()
        times = np.bincount(flat, minlength=rows * samples).reshape(rows, samples)
        means[start : start + rows] = times.astype(np.float64) @ values / samples
    return means


def bootstrap_interval(
    values: Float[np.ndarray, "samples"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval; errors as in `bootstrap_intervals`."""
    (interval,) = bootstrap_intervals(values[:, None], confidence=confidence, resamples=resamples, seed=seed)
    return interval


def rank_correlation(
    first: Float[np.ndarray, "samples tokens"],
    second: Float[np.ndarray, "samples tokens"],
    valid: Bool[np.ndarray, "samples tokens"] | None = None,
) -> Float[np.ndarray, "samples"]:
    """Spearman's correlation of two maps of each sample, over its ``valid`` tokens; ties share their mean
    rank.

    Of two constant maps it is 1, of a constant one and another 0: a constant map ranks nothing. A map of
    fewer than two tokens is constant.
    """
    found = np.empty(len(first))
    for row, maps in enumerate(zip(first, second, strict=True)):
        ranks = [rankdata(one if valid is None else one[valid[row]]) for one in maps]
        ranks = [one - one.mean() if len(one) else one for one in ranks]
        constant = [not one.any() for one in ranks]
        if any(constant):
            found[row] = float(all(constant))
        else:
            found[row] = (ranks[0] @ ranks[1]) / np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    return found


def kendall_tau(
    first: Float[np.ndarray, "*rankings items"], second: Float[np.ndarray, "*rankings items"]
) -> Float[np.ndarray, "*rankings"]:
    """Kendall's τ-b of two rankings of the same items: (C − D) / √((n − t₁) (n − t₂)), with C and D the pairs
    of items that both order alike and otherwise, n all pairs and t those that a ranking leaves tied.

    0 where one of the two leaves all tied: it ranks nothing. Numbers that differ by no more than rounding
    does (1e-12 of the largest) are tied.
    """
    upper = np.triu_indices(first.shape[-1], 1)
    signs = []
    for one in (first, second):
        apart = (one[..., :, None] - one[..., None, :])[..., upper[0], upper[1]]
        least = 1e-12 * np.abs(one).max(axis=-1, keepdims=True)
        signs.append(np.sign(apart) * (np.abs(apart) > least))
    ordered = np.prod([np.abs(sign).sum(axis=-1) for sign in signs], axis=0)
    agreement = (signs[0] * signs[1]).sum(axis=-1)
    return np.divide(agreement, np.sqrt(ordered), out=np.zeros_like(agreement), where=ordered > 0)


def trapezoid_area(
    curves: Float[np.ndarray, "*curves points"], at: Float[np.ndarray, "points"] | Sequence[float]
) -> Float[np.ndarray, "*curves"]:
    """Area under each curve by the trapezoid rule, `curves` given at the positions `at`."""
    # numpy's own is called trapz before version 2 and trapezoid after it.
    return ((curves[..., 1:] + curves[..., :-1]) / 2 * np.diff(at)).sum(axis=-1)
