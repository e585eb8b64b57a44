"""Relevance against ground truth: does the explanation point at what decides the answer?

Metrics of Arras et al. 2022 (CLEVR-XAI, arXiv 2003.07258) and the pointing game of Zhang et al. 2018. All are
computed on cells (image patches or words) and not on pixels: the pixels of one patch share one relevance, so
a patch's size and the number of its deciding pixels say everything.

Where we differ from the common implementations: those resolve ties by index, and a patch map is nothing but
ties. Ours gives the expectation under random tie-breaking, in closed form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from clipmapper.evaluation.explanation_scores.values import HIGH, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.statistics import bootstrap_interval

Masks = Sequence[Bool[np.ndarray, "_ _"]] | Bool[np.ndarray, "samples height width"]

# Relevance per pixel is a quotient: patches of different size that should tie differ in the last bits.
# Gaps of this share of the sample's largest value are ties.
_TIE = 1e-12


@dataclass(frozen=True)
class Cells:
    """Relevance and ground truth of a batch, per cell. Built by `image_cells` and `word_cells`.

    `density` is the relevance of one pixel (word) of the cell, scaled to at most 1 within a sample; `size`
    the cell's number of pixels (a word: 1, padding: 0); `inside` how many of them are ground truth.
    """

    density: Float[np.ndarray, "samples cells"]
    size: Float[np.ndarray, "samples cells"]
    inside: Float[np.ndarray, "samples cells"]


@dataclass(frozen=True)
class Localisation:
    """The scores of a batch, one entry a sample, all in [0, 1]; a uniform map reaches `area` in each."""

    mass: Float[np.ndarray, "samples"]
    rank: Float[np.ndarray, "samples"]
    pointing: Float[np.ndarray, "samples"]
    area: Float[np.ndarray, "samples"]

    @classmethod
    def concatenate(cls, parts: "Sequence[Localisation]") -> "Localisation":
        """The samples of all parts, in order."""
        names = (score.name for score in fields(cls))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def image_cells(relevance: Float[np.ndarray, "samples rows columns"], masks: Masks) -> Cells:
    """Cells of a patch grid over images, each with its mask [height, width], true at the deciding pixels.

    Pixel (y, x) belongs to patch (⌊y·rows/height⌋, ⌊x·columns/width⌋), as in nearest-neighbour enlargement;
    patches may differ in size where the grid does not divide the image. A patch's relevance is shared equally
    by its pixels, so the mass of the map is kept. A map that sums to 0 counts as uniform over *pixels*.

    Raises ValueError for negative or non-finite relevance, a sample without ground truth (there is nothing to
    find: leave it out), and a grid finer than the image.
    """
    samples, rows, columns = relevance.shape
    size, inside = np.empty((2, samples, rows, columns))
    for row, mask in enumerate(masks):
        height, width = mask.shape
        if rows > height or columns > width:
            raise ValueError(
                f"a grid of {rows} × {columns} patches needs an image of at least as many pixels"
            )
        top = -(-np.arange(rows) * height // rows)  # first pixel row of each patch row: ceil(r·height/rows)
        left = -(-np.arange(columns) * width // columns)
        size[row] = np.outer(np.diff(top, append=height), np.diff(left, append=width))
        inside[row] = np.add.reduceat(np.add.reduceat(mask.astype(np.float64), top, axis=0), left, axis=1)
    return _cells(*(cells.reshape(samples, -1) for cells in (relevance, size, inside)))


def word_cells(
    relevance: Float[np.ndarray, "samples words"],
    deciding: Bool[np.ndarray, "samples words"],
    valid: Bool[np.ndarray, "samples words"] | None = None,
) -> Cells:
    """Cells of words, `deciding` true at the words that decide the answer; errors as in `image_cells`.

    `valid` is false at the padding of shorter questions, whose relevance and ground truth must be 0.
    """
    if valid is None:
        valid = np.ones_like(deciding)
    if (deciding & ~valid).any() or relevance[~valid].any():
        raise ValueError("padding has relevance or is marked as deciding")
    return _cells(relevance, valid.astype(np.float64), deciding.astype(np.float64))


def _cells(
    relevance: Float[np.ndarray, "samples cells"],
    size: Float[np.ndarray, "samples cells"],
    inside: Float[np.ndarray, "samples cells"],
) -> Cells:
    if not np.isfinite(relevance).all():
        raise ValueError("relevance must be finite")
    if (relevance < 0).any():
        raise ValueError("relevance must not be negative: take relu or the absolute value first")
    if (inside.sum(axis=1) == 0).any():
        raise ValueError("samples without ground truth must be left out: there is nothing to find in them")
    exact = relevance.astype(np.float64)
    largest = exact.max(axis=1, keepdims=True)
    # Scaling by the largest first keeps very small and very large maps away from under- and overflow.
    share = np.where(largest > 0, exact / np.where(largest > 0, largest, 1), size)
    density = np.divide(share, size, out=np.zeros_like(share), where=size > 0)
    return Cells(density / density.max(axis=1, keepdims=True), size, inside)


def area_baseline(cells: Cells) -> Float[np.ndarray, "samples"]:
    """|GT| / (number of pixels): what a uniform map, or a random guess, reaches."""
    return cells.inside.sum(axis=1) / cells.size.sum(axis=1)


def mass_accuracy(cells: Cells) -> Float[np.ndarray, "samples"]:
    """Σ_{p∈GT} R_p / Σ_p R_p over pixels p (Arras et al. 2022, eq. 4: relevance mass accuracy)."""
    return (cells.density * cells.inside).sum(axis=1) / (cells.density * cells.size).sum(axis=1)


def rank_accuracy(cells: Cells) -> Float[np.ndarray, "samples"]:
    """|top-|GT| pixels ∩ GT| / |GT| (relevance rank accuracy), in expectation over the order of tied pixels.

    Going down the groups of equal relevance, a group that fits is taken whole; of the one that does not, k of
    its n pixels are drawn without replacement, which hits k·(its GT pixels)/n in the mean (hypergeometric).
    """
    size, inside = _tied_groups(cells)
    wanted = cells.inside.sum(axis=1)
    before = size.cumsum(axis=1) - size
    taken = np.clip(wanted[:, None] - before, 0, size)
    hit = np.divide(taken * inside, size, out=np.zeros_like(size), where=size > 0)
    return hit.sum(axis=1) / wanted


def pointing_game(cells: Cells) -> Float[np.ndarray, "samples"]:
    """Share of the most relevant pixels that lie in GT: the chance that one of them, at random, is a hit."""
    size, inside = _tied_groups(cells)
    return inside[:, 0] / size[:, 0]


def image_localisation(relevance: Float[np.ndarray, "samples rows columns"], masks: Masks) -> Localisation:
    """All scores of patch maps; arguments and errors as in `image_cells`."""
    return _localisation(image_cells(relevance, masks))


def word_localisation(
    relevance: Float[np.ndarray, "samples words"],
    deciding: Bool[np.ndarray, "samples words"],
    valid: Bool[np.ndarray, "samples words"] | None = None,
) -> Localisation:
    """All scores of word relevance; arguments and errors as in `word_cells`."""
    return _localisation(word_cells(relevance, deciding, valid))


def _localisation(cells: Cells) -> Localisation:
    return Localisation(
        mass=mass_accuracy(cells),
        rank=rank_accuracy(cells),
        pointing=pointing_game(cells),
        area=area_baseline(cells),
    )


def _tied_groups(
    cells: Cells,
) -> tuple[Float[np.ndarray, "samples groups"], Float[np.ndarray, "samples groups"]]:
    """Pixels and GT pixels of each group of equal density, most relevant group first, unused groups 0."""
    samples, width = cells.density.shape
    density = np.where(cells.size > 0, cells.density, -1.0)  # padding forms an empty group of its own, last
    order = np.argsort(-density, axis=1)
    falls = -np.diff(np.take_along_axis(density, order, axis=1), axis=1) > _TIE
    group = np.concatenate([np.zeros((samples, 1), dtype=np.int64), falls.cumsum(axis=1)], axis=1)
    flat = (group + width * np.arange(samples)[:, None]).ravel()

    def total(values: np.ndarray) -> np.ndarray:
        ordered = np.take_along_axis(values, order, axis=1).ravel()
        return np.bincount(flat, ordered, minlength=samples * width).reshape(samples, width)

    return total(cells.size), total(cells.inside)


LOCALISATION_SCORES = ("mass", "rank", "pointing")


def localisation_numbers(
    found: Mapping[str, Mapping[str, Localisation]], confidence: float, seed: int
) -> dict:
    """``found``: method → what was looked for → scores. What was looked for → area baseline, and methods."""
    out: dict = {}
    for method, by_name in found.items():
        for name, scores in by_name.items():
            table = out.setdefault(name, {})
            table["area_baseline"] = float(np.mean(scores.area))
            numbers = {}
            for score in LOCALISATION_SCORES:
                values = getattr(scores, score)
                interval = bootstrap_interval(values, confidence=confidence, seed=seed).as_dict()
                numbers[score] = interval | {"median": float(np.median(values))}
            table.setdefault("methods", {})[method] = numbers
    return out


def localisation_values(
    found: Mapping[str, Mapping[str, Localisation]],
    rows: Mapping[str, Sequence[int]],
    sample_ids: Int[np.ndarray, "samples"],
) -> ScoreValues | None:
    """The scores of all samples as those of explanations are, NaN where there is nothing to be found.

    ``rows``: what was looked for → the samples that the entries of ``found`` are of. None where nothing was.
    """
    names = [name for name in next(iter(found.values()), {}) if name in rows]
    if not names:
        return None
    quantities = [
        Quantity(f"{name}/{score}", NEITHER if score == "area" else HIGH, 100)
        for name in names
        for score in (*LOCALISATION_SCORES, "area")
    ]
    values = np.full((len(quantities), len(found), len(sample_ids)), np.nan)
    for method, by_name in enumerate(found.values()):
        filled = (getattr(by_name[name], score) for name in names for score in (*LOCALISATION_SCORES, "area"))
        for place, entries in enumerate(filled):
            values[place, method, list(rows[names[place // (len(LOCALISATION_SCORES) + 1)]])] = entries
    return ScoreValues(tuple(quantities), tuple(found), sample_ids, values)
