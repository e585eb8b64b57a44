"""What scores are worth: Kendall's tau by hand and against scipy, and the order of planted maps recovered."""

import numpy as np
import pytest
import torch
from scipy import stats

from clipmapper.evaluation.explanation_scores.chosen import as_scored, score_samples
from clipmapper.evaluation.explanation_scores.judged import PAIRS, judge, judged_table
from clipmapper.evaluation.explanation_scores.planted import PLANTED, PLANTED_NAMES, Deciding, planted_maps
from clipmapper.evaluation.explanation_scores.values import HIGH, LOW, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.statistics import bootstrap_interval, kendall_tau

# Kendall's tau


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / np.sqrt(2 * 3)),  # one of three pairs is tied in the first
        ([1, 1, 1], [1, 2, 3], 0),
        ([1, 1, 1], [2, 2, 2], 0),
        ([0.1 + 0.2, 0.3, 1], [1, 2, 3], 2 / np.sqrt(2 * 3)),  # the first two differ by rounding alone
        ([4], [1], 0),
    ],
)
def test_tau_by_hand(first, second, expected):
    assert kendall_tau(np.array(first, dtype=float), np.array(second, dtype=float)) == pytest.approx(expected)


def test_tau_is_scipys():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, (2, 50, 8)).astype(float)
    found = kendall_tau(first, second)
    for one, other, tau in zip(first, second, found, strict=True):
        assert tau == pytest.approx(stats.kendalltau(one, other).statistic, abs=1e-12)


# Methods against the truth


METHODS, TRUE = ("a", "b", "c"), {"image": {"mass": np.array([[0.1, 0.2], [0.5, 0.6], [0.7, 0.4]])}}


def scored(better: str, values, name="image/gap/probability", over=None) -> ScoreValues:
    quantities = (Quantity(name, better, over=over),)
    return ScoreValues(quantities, METHODS, np.array([4, 9]), np.array([values], dtype=float))


def judged(values: ScoreValues, truth=TRUE) -> dict:
    return judge({"one": values}, truth, confidence=0.9, seed=3)["one"]


@pytest.mark.parametrize("better", [HIGH, LOW])
def test_tau_over_methods_and_within_samples(better):
    """Means of the truth: .15, .55, .55; of the score (turned over where low is good) 1, 3, 2."""
    values = np.array([[1, 1], [4, 2], [1, 3]]) * (1 if better == HIGH else -1)
    its = judged(scored(better, values))["image/gap/probability"]
    assert its["methods"]["mass"]["mean"] == pytest.approx(2 / np.sqrt(3 * 2))
    # sample 0: 1, 4, 1 against .1, .5, .7; sample 1: 1, 2, 3 against .2, .6, .4
    within = np.array([(1 - 1) / np.sqrt(2 * 3), 1 / 3])
    expected = bootstrap_interval(within, confidence=0.9, seed=3)
    assert its["samples"]["mass"] == pytest.approx(expected.as_dict())
    assert "planted" not in its


def test_the_interval_over_methods_is_of_the_same_resamples_of_score_and_truth():
    generator = np.random.default_rng(1)
    values, true = generator.random((2, 3, 12))
    found = judge(
        {"one": ScoreValues((Quantity("q", HIGH),), METHODS, np.arange(12), values[None])},
        {"image": {"rank": true}},
        confidence=0.8,
        seed=5,
    )["one"]["q"]["methods"]["rank"]
    drawn = np.random.default_rng(5).integers(0, 12, (2000, 12))
    taus = [
        stats.kendalltau(values[:, rows].mean(axis=1), true[:, rows].mean(axis=1)).statistic for rows in drawn
    ]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(taus, [0.1, 0.9]).tolist())


def test_a_quantity_is_held_against_the_modality_that_it_is_of():
    truth = TRUE | {"text": {"mass": 1 - TRUE["image"]["mass"]}}
    values = TRUE["image"]["mass"]
    for name, expected in (("image/x", 1), ("text/x", -1), ("gap/x", 0)):
        assert judged(scored(HIGH, values, name), truth)[name]["samples"]["mass"]["mean"] == expected
    found = judge({"adcc": scored(HIGH, values, "adcc")}, truth, confidence=0.9, seed=0)
    assert found["adcc"]["adcc"]["samples"]["mass"]["mean"] == 1


def test_what_only_describes_is_left_out_and_what_does_not_fit_refused():
    assert judged(scored(NEITHER, np.zeros((3, 2)))) == {}
    with pytest.raises(ValueError, match="one: "):
        judged(scored(HIGH, np.zeros((3, 2))), {"image": {"mass": np.zeros((3, 5))}})


# Planted maps


class Certain:
    """The certainty is the share of what decides that is left, 1 less that where it is ``broken``."""

    names = ("probability",)

    def __init__(self, patches, words, valid, broken):
        self._patches, self._words, self._valid, self._broken = patches, words, valid, broken

    def _share(self, sample, decides, keep):
        kept = np.zeros_like(decides[sample])
        for row, places in enumerate(keep.numpy()):
            kept[row, places[places >= 0]] = 1
        return (decides[sample] * kept).sum(axis=1) / decides[sample].sum(axis=1)

    def unperturbed(self, batch_size):
        return np.full((len(self._patches), 1), 0.0 if self._broken else 1.0)

    def score(self, sample, image_keep, text_keep):
        found = np.ones(len(sample))
        if image_keep is not None:
            found = found * self._share(sample, self._patches, image_keep)
        if text_keep is not None:
            found = found * self._share(sample, self._words, text_keep)
        return (1 - found if self._broken else found)[:, None]


class FakeSubject:
    """Scenes of a thing of 2 × 2 patches anywhere in a grid of 6 × 6, and three of ten words, that decide."""

    modalities, certainty, grid = ("image", "text"), "probability", (6, 6)

    def __init__(self, samples=40, broken=False):
        generator = np.random.default_rng(0)
        self.sample_ids, self._broken = np.arange(samples), broken
        shares = np.zeros((samples, 6, 6))
        words = np.zeros((samples, 10))
        for row in range(samples):
            top, left = generator.integers(0, 5, 2)
            # Its left half is seen in part: a blur takes it for less than what lies beside the other.
            shares[row, top : top + 2, left : left + 2] = [0.2, 1]
            words[row, generator.permutation(10)[:3]] = 1
        self.deciding = Deciding(shares, [[(bool(w), (k + 1,)) for k, w in enumerate(r)] for r in words])
        self.text_valid = torch.ones(samples, 12, dtype=torch.bool)
        self.removable_text = self.text_valid.clone()
        self.removable_text[:, [0, -1]] = False
        self.images = torch.from_numpy(generator.random((samples, 3, 24, 24)))

    def scorer(self, replacement=None):
        words = np.zeros((len(self.sample_ids), 12))
        for row, its in enumerate(self.deciding.words):
            for decides, (token,) in its:
                words[row, token] = decides
        patches = self.deciding.patches.reshape(len(words), -1)
        return Certain(patches, words, self.text_valid, self._broken)

    layers = ()

    def certain(self):
        return self.scorer()

    def certainty_of(self, sample, images):
        raise NotImplementedError

    def maps(self, images=None, methods=None):
        return planted_maps(self.deciding, self.images, tokens=12, sample_ids=self.sample_ids, seed=0)


def removal(broken: bool) -> dict:
    subject = FakeSubject(broken=broken)
    maps = subject.maps()
    some = {"a": maps["planted/noise"], "b": maps["planted/truth"]}
    found = as_scored(score_samples("removal", subject, some | maps, batch_size=999, seed=0))
    true = np.stack([np.zeros(40), np.ones(40)])
    truth = {modality: {"mass": true, "rank": true} for modality in ("image", "text")}
    assert found.curves.methods == ("a", "b") and found.of_methods.methods == ("a", "b")
    return judge({"removal": found.values}, truth, confidence=0.95, seed=0)


def test_the_order_is_recovered_where_the_truth_is_all_that_counts():
    found = removal(broken=False)
    for name in ("image/positive", "image/negative", "image/gap", "gap"):
        its = found["removal"][f"{name}/probability"]
        assert its["methods"]["rank"] == {"mean": 1, "low": 1, "high": 1}
        verdicts = {pair: difference["verdict"] for pair, difference in its["planted"].items()}
        if name == "image/negative":  # keeps nine patches, then none: it can't see in which order these are
            assert verdicts.pop("truth > truth_blurred") == "level"
        assert set(verdicts.values()) == {"right"}, name
    for name in ("positive", "negative", "gap"):
        its = found["removal"][f"text/{name}/probability"]["planted"]
        assert {its[pair]["verdict"] for pair in its if pair.startswith("truth >")} <= {"right", "level"}
        assert its["truth > noise"]["verdict"] == its["noise > truth_inverted"]["verdict"] == "right"
    table = judged_table(found)
    assert "| removal | image/gap/probability | 1.00 [1.00, 1.00] |" in table
    assert "| 12 of 12 |  |  |" in table
    assert {line.count("|") for line in table.splitlines()} == {8}


def test_a_score_that_is_wrong_gets_every_pair_wrong():
    its = removal(broken=True)["removal"]["image/gap/probability"]
    assert {difference["verdict"] for difference in its["planted"].values()} == {"wrong"}
    assert its["methods"]["rank"]["mean"] == -1
    for difference in its["planted"].values():
        assert difference["low"] <= difference["mean"] <= difference["high"] < 0


def test_what_says_nothing_is_level():
    values = np.full((1, len(PLANTED), 6), 0.1)
    found = judge(
        {"one": ScoreValues((Quantity("q", LOW),), PLANTED_NAMES, np.arange(6), values)},
        {"image": {}},
        confidence=0.95,
        seed=0,
    )
    assert {its["verdict"] for its in found["one"]["q"]["planted"].values()} == {"level"}


def test_pairs_are_a_partial_order():
    """No map is better than itself, round any number of corners."""
    better = {(pair.better, pair.worse) for pair in PAIRS}
    assert {name for pair in better for name in pair} == set(PLANTED)
    while more := {(a, d) for a, b in better for c, d in better if b == c} - better:
        better |= more
    assert not any(a == b for a, b in better)


def test_some_methods_and_samples():
    values = ScoreValues((Quantity("q", HIGH),), METHODS, np.array([4, 9]), np.arange(6.0).reshape(1, 3, 2))
    part = values.part(("c", "a"), np.array([False, True]))
    assert part.methods == ("c", "a") and part.sample_ids.tolist() == [9]
    assert part.values.tolist() == [[[5.0], [1.0]]]
