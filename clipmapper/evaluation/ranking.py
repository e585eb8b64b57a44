"""Several methods on several models: ranks, what ranks tell apart, wins and losses, and how alike orders are.

Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006): mean ranks, and the
test of Nemenyi, §3.2.2. A *block* is what all methods are compared on: a sample, or a model.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau, rankdata, studentized_range


def ranks(values: Float[np.ndarray, "methods blocks"], *, high: bool) -> Float[np.ndarray, "methods blocks"]:
    """The rank of each method in each block, 1 the best; methods that tie share the mean of their ranks.

    ``high``: whether a high value is good. Raises ValueError for values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("ranks need finite values")
    return rankdata(-values if high else values, axis=0)


def critical_difference(methods: int, blocks: int, *, level: float = 0.05) -> float:
    """CD = q_α √(k (k + 1) / 6N), with k methods, N blocks and q_α the studentised range of k groups and
    infinitely many degrees of freedom, divided by √2 (Demšar 2006, eq. for Nemenyi's test and table 5).

    Two methods whose mean ranks differ by at least as much differ at the ``level`` of all comparisons
    together. Raises ValueError for fewer than two methods, or no block.
    """
    if methods < 2 or blocks < 1:
        raise ValueError(f"needs at least two methods and one block: {methods}, {blocks}")
    q = float(studentized_range.ppf(1 - level, methods, np.inf)) / np.sqrt(2)
    return q * float(np.sqrt(methods * (methods + 1) / (6 * blocks)))


def cliques(mean_ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """The longest runs of methods, sorted by mean rank, whose first and last differ by less than
    ``difference``: (place of the first, place of the last) of each that has two methods or more."""
    order = sorted(mean_ranks)
    found: list[tuple[int, int]] = []
    for first, rank in enumerate(order):
        last = max(place for place, other in enumerate(order) if other - rank < difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def outcomes(
    means: Float[np.ndarray, "sets methods"], *, high: bool, confidence: float
) -> Float[np.ndarray, "methods methods"]:
    """+1 where the method of the row is better than that of the column, −1 where it is worse, 0 where the
    interval of their difference holds 0.

    ``means``: of resamples, the same ones for every method, so that differences are paired.
    """
    tail = (1 - confidence) / 2
    found = np.zeros((means.shape[1], means.shape[1]))
    for row in range(means.shape[1] - 1):
        difference = means[:, [row]] - means[:, row + 1 :]
        low, high_end = np.quantile(difference, [tail, 1 - tail], axis=0)
        found[row, row + 1 :] = (low > 0).astype(float) - (high_end < 0)
    found -= found.T
    return found if high else -found


def rank_agreement(first: Float[np.ndarray, "methods"], second: Float[np.ndarray, "methods"]) -> float | None:
    """Kendall's τ-b of two orders of the same methods; None where one of them orders nothing."""
    tau = kendalltau(first, second).statistic
    return None if np.isnan(tau) else float(tau)
