"""Ranks, critical differences, wins and losses, and the agreement of orders, against published and hand-made
numbers."""

import numpy as np
import pytest

from clipmapper.evaluation.ranking import cliques, critical_difference, outcomes, rank_agreement, ranks


def test_the_best_has_rank_one_and_ties_share():
    values = np.array([[0.9, 0.1], [0.5, 0.1], [0.5, 0.3], [0.2, 0.2]])
    assert ranks(values, high=True)[:, 0].tolist() == [1, 2.5, 2.5, 4]
    assert ranks(values, high=False)[:, 1].tolist() == [1.5, 1.5, 4, 3]
    with pytest.raises(ValueError, match="finite"):
        ranks(np.array([[np.nan]]), high=True)


# Demšar 2006, table 5 (a): two-tailed Nemenyi test, α = 0.05.
@pytest.mark.parametrize(
    "methods, q", list(enumerate([1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164], start=2))
)
def test_critical_values_are_the_published_ones(methods, q):
    blocks = 14
    found = critical_difference(methods, blocks) / np.sqrt(methods * (methods + 1) / (6 * blocks))
    # The table rounds studentised ranges of two decimals: the last digit of some is one too high.
    assert found == pytest.approx(q, abs=1.5e-3)


def test_the_example_of_the_paper():
    """§3.2.2: four classifiers on 14 data sets, mean ranks 3.143, 2.000, 2.893, 1.964: CD 1.25."""
    difference = critical_difference(4, 14)
    assert difference == pytest.approx(1.25, abs=0.01)
    assert critical_difference(4, 14, level=0.10) == pytest.approx(1.12, abs=0.01)
    # The last against the first is 1.18, against the second 1.14: less than 1.25 and more than 1.12.
    assert cliques([3.143, 2.000, 2.893, 1.964], difference) == [(0, 3)]
    assert cliques([3.143, 2.000, 2.893, 1.964], 1.12) == [(0, 2), (2, 3)]


def test_cliques_are_the_longest_runs():
    assert cliques([1.0, 2.0, 5.0, 6.0, 9.0], 2.0) == [(0, 1), (2, 3)]
    assert cliques([1.0, 4.0, 7.0], 2.0) == []
    assert cliques([1.0, 2.0], 1.0) == []  # a difference of exactly CD tells apart
    with pytest.raises(ValueError, match="at least two"):
        critical_difference(1, 5)


def test_wins_and_losses_by_hand():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1000)
    # Far apart; equal but for noise; and always a little better, though both vary more than that.
    means = np.stack([noise + 10, noise, noise + 0.01, rng.normal(size=1000)], axis=1)
    found = outcomes(means, high=True, confidence=0.95)
    assert found.tolist() == [[0, 1, 1, 1], [-1, 0, -1, 0], [-1, 1, 0, 0], [-1, 0, 0, 0]]
    assert (outcomes(means, high=False, confidence=0.95) == -found).all()


def test_agreement_of_orders():
    assert rank_agreement(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1
    # One of three pairs is the other way round.
    assert rank_agreement(np.array([1.0, 2, 3]), np.array([2.0, 1, 3])) == pytest.approx(1 / 3)
    assert rank_agreement(np.array([1.0, 1, 1]), np.array([2.0, 1, 3])) is None
