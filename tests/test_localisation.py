"""Localisation: hand-worked maps, a pixel-level simulation, and properties."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipmapper.evaluation.localisation import (
    area_baseline,
    image_cells,
    image_localisation,
    mass_accuracy,
    pointing_game,
    rank_accuracy,
    word_cells,
    word_localisation,
)
from clipmapper.tasks.vqa.pictures import localisation_table

unhurried = settings(deadline=None, max_examples=25)  # a busy machine is not a failure


def scores(relevance, mask):
    """mass, rank, pointing, area of one sample."""
    result = image_localisation(np.array(relevance, dtype=np.float64)[None], np.array(mask, dtype=bool)[None])
    return tuple(float(x[0]) for x in (result.mass, result.rank, result.pointing, result.area))


def test_two_by_two_patches_on_five_by_five_pixels_by_hand():
    # Patch sizes: rows 3 + 2, columns 3 + 2, so 9, 6, 6, 4 pixels.
    relevance = [[9.0, 3.0], [1.2, 2.0]]  # per pixel 1.0, 0.5, 0.2, 0.5
    mask = np.zeros((5, 5), dtype=bool)
    mask[2:4, 2:4] = True  # one pixel of each patch
    # mass: (1.0 + 0.5 + 0.2 + 0.5) / 15.2
    # rank: the top 4 pixels all lie in the first patch, which has 1 deciding pixel among 9: 4 · 1/9 of 4
    # pointing: 1 of the 9 maximal pixels
    assert scores(relevance, mask) == pytest.approx((2.2 / 15.2, 1 / 9, 1 / 9, 4 / 25))
    # 12 deciding pixels: the first patch gives its 3; of the tied pair (10 pixels, 4 deciding) 3 are drawn.
    mask[:] = False
    mask[0, :3] = True  # 3 of patch 0
    mask[0, 3:] = True  # 2 of patch 1
    mask[3, 3:] = True  # 2 of patch 3
    mask[3, :3] = True  # 3 of patch 2
    mask[4, :2] = True  # 2 more of patch 2
    assert mask.sum() == 12
    assert scores(relevance, mask) == pytest.approx(
        ((3 * 1.0 + 2 * 0.5 + 5 * 0.2 + 2 * 0.5) / 15.2, (3 + 3 * 4 / 10) / 12, 3 / 9, 12 / 25)
    )


def test_patches_cut_the_image_as_nearest_neighbour_enlargement_does():
    relevance = np.array([[[1.0, 0.0, 0.0]]])
    for x, hit in enumerate([1, 1, 1, 0, 0, 0, 0]):  # 7 pixels in 3 patches: 3, 2, 2
        mask = np.zeros((1, 1, 7), dtype=bool)
        mask[..., x] = True
        assert mass_accuracy(image_cells(relevance, mask)) == pytest.approx([hit / 3])


@unhurried
@given(
    relevance=hnp.arrays(np.float64, (2, 3), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])),
    mask=hnp.arrays(np.bool_, (4, 4)).filter(np.any),
)
def test_equals_a_pixel_loop_over_all_tie_orders(relevance, mask):
    """Independent: pixels, exact fractions, every order of the groups' pixels reduced to counting."""
    density = {}
    patch = {(y, x): (y * 2 // 4, x * 3 // 4) for y in range(4) for x in range(4)}
    sizes = {p: sum(q == p for q in patch.values()) for p in patch.values()}
    total = Fraction(float(relevance.sum()))
    for pixel, p in patch.items():
        density[pixel] = Fraction(float(relevance[p])) / sizes[p] if total else Fraction(1)
    wanted = int(mask.sum())
    mass = sum(density[p] for p in density if mask[p]) / sum(density.values())
    left, hits = wanted, Fraction(0)
    for value in sorted(set(density.values()), reverse=True):
        tied = [p for p in density if density[p] == value]
        share = Fraction(sum(bool(mask[p]) for p in tied), len(tied))
        take = min(left, len(tied))
        hits += take * share
        left -= take
    top = [p for p in density if density[p] == max(density.values())]
    pointing = Fraction(sum(bool(mask[p]) for p in top), len(top))
    expected = (mass, hits / wanted, pointing, Fraction(wanted, 16))
    assert scores(relevance, mask) == pytest.approx([float(x) for x in expected], abs=1e-12)


def test_expectation_is_the_mean_over_all_orders_of_tied_words():
    relevance, deciding = np.array([2.0, 1.0, 1.0, 1.0, 0.0]), np.array([False, True, False, False, True])
    hits = []
    for order in permutations(range(5)):
        ranked = sorted(order, key=lambda word: -relevance[word])  # stable: ties keep the random order
        hits.append(deciding[ranked[:2]].mean())
    result = word_localisation(relevance[None], deciding[None])
    assert result.rank == pytest.approx([np.mean(hits)])
    assert result.mass == pytest.approx([1 / 5])
    assert result.pointing == pytest.approx([0.0])
    assert result.area == pytest.approx([2 / 5])


maps = hnp.arrays(np.float64, (3, 4, 3), elements=st.floats(0, 1e6))
masks = hnp.arrays(np.bool_, (3, 9, 7)).map(
    lambda m: np.concatenate([m[:, :8], np.ones_like(m[:, :1])], axis=1)
)


@unhurried
@given(maps, masks)
def test_scores_are_shares(relevance, mask):
    cells = image_cells(relevance, mask)
    for metric in (mass_accuracy, rank_accuracy, pointing_game, area_baseline):
        assert (metric(cells) >= -1e-12).all() and (metric(cells) <= 1 + 1e-12).all()


@unhurried
@given(masks, st.floats(1e-300, 1e300))
def test_uniform_map_reaches_the_area_in_everything(mask, level):
    pixels = np.outer([3, 2, 2, 2], [3, 2, 2])  # uniform per pixel: relevance follows the uneven patch size
    relevance = np.broadcast_to(pixels / 63 * level, (3, 4, 3)).copy()
    result = image_localisation(relevance, mask)
    for metric in (result.mass, result.rank, result.pointing):
        assert metric == pytest.approx(mask.mean(axis=(1, 2)), rel=1e-12)
    assert result.area == pytest.approx(mask.mean(axis=(1, 2)), rel=1e-12)


@unhurried
@given(masks)
def test_a_map_of_zeros_counts_as_uniform(mask):
    result = image_localisation(np.zeros((3, 4, 3)), mask)
    assert (result.mass == result.area).all() and (result.pointing == result.area).all()
    assert result.rank == pytest.approx(result.area, rel=1e-15)


@unhurried
@given(maps, masks, st.floats(1e-3, 1e3))
def test_scale_does_not_matter(relevance, mask, scale):
    whole = np.round(relevance)  # gaps well above rounding, so that scaling makes and breaks no tie
    before, after = image_localisation(whole, mask), image_localisation(whole * scale, mask)
    for name in ("mass", "rank", "pointing"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9, abs=1e-12)


@unhurried
@given(hnp.arrays(np.bool_, (2, 4, 3)).map(lambda m: m | (np.arange(12).reshape(4, 3) == 5)))
def test_planted_map_reaches_one(patches):
    mask = patches.repeat(2, axis=1).repeat(3, axis=2)
    result = image_localisation(patches.astype(np.float64), mask)
    for metric in (result.mass, result.rank, result.pointing):
        assert metric == pytest.approx([1.0, 1.0])


@unhurried
@given(maps, masks)
def test_batch_equals_one_by_one(relevance, mask):
    together = image_localisation(relevance, mask)
    for i in range(3):
        alone = image_localisation(relevance[i : i + 1], mask[i : i + 1])
        for name in ("mass", "rank", "pointing", "area"):
            assert getattr(alone, name) == pytest.approx(getattr(together, name)[i : i + 1], rel=1e-12)


def test_padding_of_words_changes_nothing():
    relevance, deciding = np.array([[0.0, 2.0, 1.0]]), np.array([[True, False, True]])
    padded = word_localisation(
        np.pad(relevance, ((0, 0), (0, 2))),
        np.pad(deciding, ((0, 0), (0, 2))),
        np.array([[True, True, True, False, False]]),
    )
    plain = word_localisation(relevance, deciding)
    for name in ("mass", "rank", "pointing", "area"):
        assert getattr(padded, name) == pytest.approx(getattr(plain, name))
    zeros = word_cells(np.zeros((1, 3)), np.array([[True, False, False]]), np.array([[True, True, False]]))
    assert mass_accuracy(zeros) == pytest.approx([0.5])
    assert rank_accuracy(zeros) == pytest.approx([0.5])
    with pytest.raises(ValueError, match="padding"):
        word_cells(relevance, deciding, np.array([[True, True, False]]))


def test_float32_maps_are_taken():
    relevance = np.full((1, 2, 2), 0.1, dtype=np.float32)
    mask = np.eye(4, dtype=bool)[None]
    assert image_localisation(relevance, mask).rank == pytest.approx([0.25])


def test_refuses_maps_without_meaning():
    mask = np.ones((1, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="negative"):
        image_cells(np.array([[[1.0, -0.1]]]), mask)
    with pytest.raises(ValueError, match="finite"):
        image_cells(np.array([[[1.0, np.nan]]]), mask)
    with pytest.raises(ValueError, match="without ground truth must be left out"):
        image_cells(np.ones((1, 2, 2)), np.zeros((1, 4, 4), dtype=bool))
    with pytest.raises(ValueError, match="without ground truth must be left out"):
        word_cells(np.ones((1, 2)), np.zeros((1, 2), dtype=bool))
    with pytest.raises(ValueError, match="at least as many pixels"):
        image_cells(np.ones((1, 5, 2)), mask)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_table_of_one_sample_has_no_interval(samples):
    value = {"mean": 0.25, "low": 0.2, "high": 0.3, "median": 0.25}
    methods = {"weighted": {"mass": value, "rank": value, "pointing": value}}
    found = {"image": {"area_baseline": 0.1, "methods": methods}}
    results = {"samples": samples, "confidence": 0.95, "localisation": found}
    cells = [next(iter(column.cells)) for column in localisation_table(results).columns]
    assert cells == ["weighted", *(["25.0"] if samples == 1 else ["25.0 ± 5.0"]) * 3]
