"""Planted maps: made from the truth, from the image alone or from nothing, to see what a score says of them.

What a score of explanations is worth can be told where it is known which pixels and words decide: it should
prefer the truth to all else, and anything to the truth turned upside down
(:mod:`~clipmapper.evaluation.explanation_scores.judged`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter
from torch import Tensor

from clipmapper.evaluation.explanation_scores.replacement import patch_side
from clipmapper.evaluation.localisation import Masks, image_cells
from clipmapper.evaluation.perturbation import ModalityRelevance

PREFIX = "planted/"
PLANTED = ("truth", "truth_blurred", "truth_shifted", "truth_inverted", "centre", "edges", "noise")
PLANTED_NAMES = tuple(PREFIX + name for name in PLANTED)
"""As they stand behind the methods."""

_DRAWN_NOISE = 0xB1  # a stream of random numbers of its own (clipmapper.training.explained)
_LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601


@dataclass(frozen=True)
class Deciding:
    """What decides of some samples.

    ``patches``: the share of each patch's pixels that decides. ``words``: of each sample's words, whether it
    decides, and the positions of its tokens; no words where text is not explained.
    """

    patches: Float[np.ndarray, "samples rows columns"]
    words: Sequence[Sequence[tuple[bool, Sequence[int]]]]

    def part(self, positions: range) -> "Deciding":
        """Those of the samples at these positions."""
        some = slice(positions.start, positions.stop)
        return Deciding(self.patches[some], self.words[some])


def is_planted(method: str) -> bool:
    """Whether a name among methods is a planted map's."""
    return method.startswith(PREFIX)


def patch_shares(masks: Masks, grid: tuple[int, int]) -> Float[np.ndarray, "samples rows columns"]:
    """The share of deciding pixels of each patch; masks lie on the grid, and errors are, as those of
    :func:`~clipmapper.evaluation.localisation.image_cells`."""
    cells = image_cells(np.ones((len(masks), *grid)), masks)
    return (cells.inside / cells.size).reshape(-1, *grid)


def planted_maps(
    deciding: Deciding,
    images: Float[Tensor, "samples 3 height width"],
    *,
    tokens: int,
    sample_ids: Int[np.ndarray, "samples"],
    seed: int,
) -> dict[str, ModalityRelevance]:
    """Every planted map of some samples, by its name in :data:`PLANTED_NAMES`.

    Those of patches and those of words are made alike (a line of words is a grid of one row), and all tokens
    of a word get its value, others 0 (of ``tokens``, padding included). But words have no edges: there, a
    constant, which prefers none of them.
    """
    on_patches = {name: np.zeros(deciding.patches.shape) for name in PLANTED}
    on_tokens = {name: np.zeros((len(sample_ids), tokens)) for name in PLANTED}
    on_patches["edges"] = edges(images, deciding.patches.shape[1:])
    for row, sample in enumerate(sample_ids.tolist()):
        generator = np.random.default_rng((seed, sample, _DRAWN_NOISE))
        for name, its in _of_one(deciding.patches[row], generator).items():
            on_patches[name][row] = its
        if words := deciding.words[row]:
            line = np.array([float(decides) for decides, _ in words])
            for name, its in (_of_one(line, generator) | {"edges": np.ones(len(line))}).items():
                for value, (_, positions) in zip(its, words, strict=True):
                    on_tokens[name][row, list(positions)] = value
    return {
        PREFIX + name: ModalityRelevance(
            torch.from_numpy(on_patches[name]).flatten(1), torch.from_numpy(on_tokens[name])
        )
        for name in PLANTED
    }


def _of_one(truth: Float[np.ndarray, "..."], generator: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "truth": truth,
        "truth_blurred": blurred(truth),
        "truth_shifted": shifted(truth),
        "truth_inverted": 1 - truth,
        "centre": centre(truth.shape),
        "noise": generator.random(truth.shape),
    }


def blurred(truth: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Under a Gaussian with a standard deviation of one patch (word), mirrored at the border, so that the sum
    stays."""
    return gaussian_filter(truth, 1.0, mode="reflect")


def shifted(truth: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """One patch (word) to the right; what leaves a row at its end comes in at its start. So the map has the
    same values as the truth, and only their places are wrong."""
    return np.roll(truth, 1, axis=-1)


def centre(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """A Gaussian in the middle, whose standard deviation is a quarter of each side."""
    found = np.ones(shape)
    for axis, side in enumerate(shape):
        away = (np.arange(side) - (side - 1) / 2) / (side / 4)
        found *= np.exp(-(away**2) / 2).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return found


def edges(
    images: Float[Tensor, "samples 3 height width"], grid: tuple[int, int]
) -> Float[np.ndarray, "samples rows columns"]:
    """How large the gradient of the luminance (by central differences) is, in the mean over each patch.

    Of the pixels as the tower reads them: its scales of the three colours are nearly the same.
    """
    weights = torch.tensor(_LUMINANCE, dtype=torch.float64)
    luminance = torch.einsum("nchw,c->nhw", images.double().cpu(), weights)
    size = torch.stack(torch.gradient(luminance, dim=(1, 2))).norm(dim=0)
    (rows, columns), (high, wide) = grid, patch_side(images, grid)
    patches = size[:, : rows * high, : columns * wide].unflatten(2, (columns, wide))
    return patches.unflatten(1, (rows, high)).mean(dim=(2, 4)).numpy()
