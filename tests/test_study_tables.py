"""The tables of a study on values that are made up, so that every number is known."""

import numpy as np
import pytest

from clipmapper.evaluation.explanation_scores.values import HIGH, LOW, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.study.claims import claim_rows
from clipmapper.evaluation.study.headline import is_claimed, is_ranked
from clipmapper.evaluation.study.tables import StudyCell, agreement, section_tables
from clipmapper.evaluation.study.trust import trust_rows
from clipmapper.evaluation.study.values import StudyValues, side_by_side
from clipmapper.evaluation.study.winners import winner_rows

METHODS = ("weighted", "gae", "random")
SAMPLES = 40


def cell(model: str, seed: int, levels: dict[str, float], **more) -> StudyCell:
    """A gap and a low area, each at a level of the method's own, and an oracle's share of 20 samples."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=0.01, size=(2, len(METHODS), SAMPLES))
    level = np.array([levels[method] for method in METHODS])[None, :, None]
    removal = ScoreValues(
        (Quantity("image/gap/probability", HIGH, 100), Quantity("image/positive/probability", LOW, 100)),
        METHODS, np.arange(SAMPLES), np.concatenate([level + noise[:1], 1 - level + noise[1:]]),
    )  # fmt: skip
    gained = np.broadcast_to(level[0], (len(METHODS), 20))
    oracle = ScoreValues(
        (Quantity("share", HIGH, 100, over="possible"), Quantity("possible", NEITHER)),
        METHODS, np.arange(20), np.stack([gained, np.full_like(gained, 2.0)]),
    )  # fmt: skip
    groups = {"answer": ["right"] * 30 + ["wrong"] * 10}
    values = side_by_side(
        [("vqa", "removal", removal), ("vqa", "oracle", oracle)], np.arange(SAMPLES), groups
    )
    return StudyCell(f"{model}/{seed}", model, values, **more)


DUAL = {"weighted": 0.5, "gae": 0.3, "random": 0.0}
CELLS = [
    cell("dual", 0, DUAL, unchanged=["random"], seconds=dict.fromkeys(METHODS, 1.0)),
    cell("dual", 1, DUAL, seconds=dict.fromkeys(METHODS, 3.0)),
    cell("single", 0, {"weighted": 0.2, "gae": 0.4, "random": 0.0}),
]


def test_who_wins_on_each_model():
    rows = winner_rows(CELLS, confidence=0.95, seed=0)
    assert {(row["cell"], row["quantity"]) for row in rows} == {
        (one.name, name) for one in CELLS for name in ("removal/image/gap/probability", "oracle/share")
    }
    gaps = [row for row in rows if row["quantity"] == "removal/image/gap/probability"]
    assert [row["best"] for row in gaps] == ["weighted", "weighted", "gae"]
    assert not any(row["level"] for row in gaps)
    assert gaps[0]["over_weighted"] == {"mean": 0, "low": 0, "high": 0}
    assert gaps[2]["over_weighted"]["low"] > 0.19 and gaps[2]["value"] == pytest.approx(0.4, abs=0.01)
    near = cell("near", 3, {"weighted": 0.5, "gae": 0.5005, "random": 0.0})
    (row,) = (r for r in winner_rows([near], confidence=0.95, seed=0) if r["quantity"].startswith("removal"))
    assert {row["best"], *row["level"]} == {"weighted", "gae"}


def judgement(truth: float, tau: float, verdict: str) -> dict:
    interval = {"mean": tau, "low": tau - 0.1, "high": tau + 0.1}
    return {
        "methods": {"rank": interval, "mass": interval},
        "samples": {"rank": interval, "mass": interval},
        "planted": {"truth > noise": {"mean": 0.1, "low": 0, "high": 1, "verdict": verdict}},
        "maps": {"truth": truth, "noise": 0.0},
    }


def test_what_scores_are_worth_over_models(table):
    quantity = {"image/gap/probability": judgement(0.45, 0.5, "right"), "image/positive/probability": {}}
    other = {"image/gap/probability": judgement(0.15, 0.1, "wrong")}
    judged = {
        "dual/0": {"vqa": {"removal": {"samples": 40, "quantities": quantity}}},
        "single/0": {"vqa": {"removal": {"samples": 20, "quantities": other}}},
    }
    (row,) = trust_rows(judged, {"vqa": table})  # the oracle was not judged, and areas do not rank
    assert (row["section"], row["quantity"]) == ("vqa", "removal/image/gap/probability")
    assert (row["samples"], row["models"]) == (30, 2)
    assert row["tau_of_methods"] == {"mean": pytest.approx(0.3), "low": 0.1, "high": 0.5}
    assert row["pairs"] == {"right": {"truth > noise": 1}, "level": {}, "wrong": {"truth > noise": 1}}
    assert row["truth"] == pytest.approx(0.3) and row["best"] == pytest.approx(0.45, abs=0.01)
    # Above the truth are weighted on the first, and weighted and gae on the second.
    assert row["above_truth"] == 1.5


@pytest.fixture(scope="module")
def table() -> dict:
    return section_tables(CELLS, confidence=0.95, seed=0)["vqa"]


def test_means_ranks_wins_and_losses(table):
    gap = table["quantities"]["removal/image/gap/probability"]
    weighted = gap["methods"]["weighted"]
    assert weighted["mean"] == pytest.approx(0.4, abs=0.01) and weighted["low"] < 0.4 < weighted["high"]
    assert weighted["deviation"] == pytest.approx(np.std([0.5, 0.5, 0.2], ddof=1), abs=0.01)
    assert [gap["methods"][m]["rank"] for m in METHODS] == pytest.approx([4 / 3, 5 / 3, 3])
    # Better than gae and random in two cells, worse than gae in the third.
    assert gap["wins"] == [[0, 2, 3], [1, 0, 3], [0, 0, 0]]
    assert (weighted["wins"], weighted["losses"]) == (5, 1)
    assert gap["tau"][0][1] == 1 and gap["tau"][0][2] == pytest.approx(1 / 3)
    assert gap["blocks"] == SAMPLES and gap["critical_difference"] < gap["critical_difference_of_cells"]
    assert agreement({"vqa": table})["vqa"][0] == pytest.approx([1, 1, 1 / 3])
    # Every sample is a block: of two seeds the mean, of two models the mean of the ranks.
    assert gap["methods"]["weighted"]["sample_rank"] == pytest.approx(1.5)


def test_overall_over_quantities_and_cells(table):
    assert set(table["quantities"]) == {"removal/image/gap/probability", "oracle/share"}
    overall = table["methods"]["weighted"]
    assert overall["mean_rank"] == pytest.approx(4 / 3) and (overall["wins"], overall["losses"]) == (10, 2)
    assert overall["level"] == 0 and overall["seconds_a_sample"] == 2
    assert table["methods"]["random"]["unchanged_in"] == 1


def test_a_share_is_a_quotient_of_means_over_the_scored_samples(table):
    share = table["quantities"]["oracle/share"]
    assert share["samples"] == 20 and share["methods"]["gae"]["mean"] == pytest.approx(
        (0.15 + 0.15 + 0.2) / 3
    )
    assert set(share["methods"]["gae"]["groups"]["answer"]) == {"right"}  # the first 20 are all right


def test_by_group(table):
    groups = table["quantities"]["removal/image/gap/probability"]["methods"]["gae"]["groups"]["answer"]
    assert {label: found["samples"] for label, found in groups.items()} == {"right": 30, "wrong": 10}
    assert groups["right"]["mean"] == pytest.approx(1 / 3, abs=0.01)
    width = {label: found["high"] - found["low"] for label, found in groups.items()}
    assert width["right"] < width["wrong"]


def test_claims():
    rows = claim_rows(CELLS, confidence=0.95, seed=0)
    assert [(row["model"], row["quantity"]) for row in rows] == [
        ("dual", "removal/image/positive/probability"),
        ("single", "removal/image/positive/probability"),
    ]
    # Low areas are good: 1 − 0.5 is better than 1 − 0.3.
    assert rows[0]["against"]["gae"]["verdict"] == "better"
    assert rows[0]["against"]["gae"]["mean"] == pytest.approx(-0.2, abs=0.01)
    assert rows[1]["against"]["gae"]["verdict"] == "worse" and set(rows[1]["against"]) == {"gae"}
    same = cell("same", 3, dict.fromkeys(METHODS, 0.5))
    assert claim_rows([same], confidence=0.999, seed=0)[0]["against"]["gae"]["verdict"] == "level"


def test_values_are_read_back(tmp_path):
    values = CELLS[0].values
    np.savez_compressed(tmp_path / "values.npz", **values.to_arrays())
    with np.load(tmp_path / "values.npz", allow_pickle=False) as stored:
        found = StudyValues.from_arrays(stored)
    assert found.quantities == values.quantities and found.sections == values.sections
    assert found.groups == values.groups and found.methods == METHODS
    np.testing.assert_allclose(found.values, values.values, rtol=1e-6)
    assert np.isnan(found.values[2, :, 20:]).all()


@pytest.mark.parametrize(
    "name, better, ranked, claimed",
    [
        ("removal/gap/probability", HIGH, True, False),
        ("removal/image/gap/accuracy", HIGH, False, False),
        ("removal/text/negative/probability", HIGH, False, True),
        ("removal/image/positive/log_probability", LOW, False, True),
        ("replace_grey/image/positive/probability", LOW, False, False),
        ("replace_grey/image/gap/word_probability", HIGH, True, False),
        ("oracle/image/share", HIGH, True, False),
        ("oracle/image/positive/share", HIGH, False, False),
        ("oracle/possible", NEITHER, False, False),
        ("adcc/adcc", HIGH, True, False),
        ("adcc/coherency", HIGH, False, False),
        ("f_syn/f_syn", HIGH, True, False),
        ("sanity/image/all", LOW, False, False),
        ("localisation/image/mass", HIGH, True, False),
        ("localisation/image/area", NEITHER, False, False),
        ("infidelity/image", LOW, True, False),
    ],
)
def test_what_is_ranked(name, better, ranked, claimed):
    quantity = Quantity(name, better)
    assert (is_ranked(quantity), is_claimed(quantity)) == (ranked, claimed)
