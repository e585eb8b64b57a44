"""Bootstrap intervals: against scipy, coverage, and what is refused."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from clipmapper.evaluation import statistics
from clipmapper.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_intervals,
    rank_correlation,
    trapezoid_area,
)


def test_agrees_with_scipys_percentile_bootstrap():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).gamma(2.0, size=60)
    ours = bootstrap_interval(values, confidence=0.9, resamples=5000, seed=2)
    theirs = scipy_stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=0.9,
        n_resamples=5000,
        method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean(), rel=1e-12)
    assert abs(ours.low - theirs.low) < 0.06 * width  # Monte Carlo error of an end is about 2 % of the width
    assert abs(ours.high - theirs.high) < 0.06 * width


def test_equals_a_plain_loop_over_the_same_resamples():
    values = np.random.default_rng(4).normal(size=13)
    generator = np.random.default_rng(5)
    means = [values[generator.integers(0, 13, 13)].mean() for _ in range(500)]
    interval = bootstrap_interval(values, confidence=0.8, resamples=500, seed=5)
    assert interval.low == pytest.approx(np.percentile(means, 10), abs=1e-12)
    assert interval.high == pytest.approx(np.percentile(means, 90), abs=1e-12)


def test_chunks_change_nothing_but_memory(monkeypatch):
    values = np.random.default_rng(6).normal(size=(50, 3))
    whole = bootstrap_intervals(values, resamples=301)
    monkeypatch.setattr(statistics, "_CHUNK_ENTRIES", 50 * 7)
    chunked = bootstrap_intervals(values, resamples=301)
    for a, b in zip(whole, chunked, strict=True):
        assert a.as_dict() == pytest.approx(b.as_dict(), abs=1e-12)


def test_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        interval = bootstrap_interval(generator.normal(0.3, 1.0, 60), resamples=400, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.90 <= hits / 400 <= 0.98


def test_columns_are_the_single_intervals():
    values = np.random.default_rng(8).normal(size=(20, 4))
    together = bootstrap_intervals(values, seed=9)
    for column, interval in enumerate(together):
        alone = bootstrap_interval(values[:, column], seed=9)
        assert interval.as_dict() == pytest.approx(alone.as_dict(), abs=1e-12)


def test_seed_decides_and_level_widens():
    values = np.random.default_rng(11).normal(size=30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_constant_and_single_values_have_no_width():
    assert bootstrap_interval(np.array([0.7])) == Interval(0.7, 0.7, 0.7)
    for value, count in ((0.1, 3), (1 / 3, 7), (0.7, 20)):  # 0.1 + 0.1 + 0.1 is not 0.3 in binary
        assert bootstrap_interval(np.full(count, value)) == Interval(value, value, value)
    assert bootstrap_interval(np.zeros(5)).as_dict() == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_interval(np.array([], dtype=np.float64))
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(np.ones(3), confidence=95.0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval(np.ones(3), resamples=0)


def test_trapezoid_area_by_hand():
    curves = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    assert trapezoid_area(curves, (0.0, 0.2, 1.0)) == pytest.approx([0.15 + 0.2, 1.0])


@pytest.mark.parametrize("levels", [1000, 4], ids=["untied", "tied"])
def test_rank_correlation_agrees_with_scipy(levels):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, levels, (2, 20, 12)).astype(float)
    valid = rng.random((20, 12)) < 0.7
    for row, its in enumerate(rank_correlation(first, second)):
        assert its == pytest.approx(spearmanr(first[row], second[row]).statistic)
    for row, its in enumerate(rank_correlation(first, second, valid)):
        kept = valid[row]
        assert its == pytest.approx(spearmanr(first[row][kept], second[row][kept]).statistic)


def test_rank_correlation_by_hand():
    """Ranks 1, 2, 3 and 1, 3, 2: 1 − 6 · 2 / (3 · 8) = ½. A constant map ranks nothing."""
    first = np.array([[1.0, 5, 9], [1, 2, 3], [1, 2, 3], [2, 2, 2], [2, 2, 2]])
    second = np.array([[1.0, 3, 2], [9, 8, 0], [10, 20, 40], [1, 2, 3], [5, 5, 5]])
    assert rank_correlation(first, second).tolist() == pytest.approx([0.5, -1, 1, 0, 1])
    assert rank_correlation(second, first).tolist() == pytest.approx([0.5, -1, 1, 0, 1])
    one_or_none = np.array([[True, False, False], [False, False, False]])
    assert rank_correlation(first[:2], second[:2], one_or_none).tolist() == [1, 1]
