"""ADCC: is what a map shows enough for the answer, is it stable, is it small?

Poppi et al. 2021, arXiv 2104.10252. Of image maps alone: the map is laid over the pixels, the text stays
whole.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.evaluation.explanation_scores.replacement import patch_side
from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.values import HIGH, LOW, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import ModalityRelevance


def adcc(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """ADCC = 3 / (1/coherency + 1/(1 − complexity) + 1/(1 − drop)) and its parts, with M the map, min–max
    scaled to [0, 1] (a constant map: all 1), one value a patch.

    - drop = max(0, y_c − o_c) / y_c, o_c the certainty at x ⊙ M, x as the tower reads it (normalised, so that
      where M is 0 there is the mean colour of its training images); 0 where y_c is 0;
    - coherency = (Pearson(M(x), M(x ⊙ M)) + 1) / 2; where one of the maps is constant, 1 if both are, else ½;
    - complexity = Σ M / patches, the L1 norm per patch;
    - where one of the three terms of the harmonic mean is 0, ADCC is 0, its limit.
    """
    certain = subject.certain().unperturbed(batch_size)[:, 0]
    every = np.arange(len(subject.sample_ids))
    values = np.empty((4, len(maps), len(every)))
    for number, (method, relevance) in enumerate(maps.items()):
        if progress is not None:
            progress(0)
        scaled = min_max(relevance.image.double())
        seen = subject.images * _over_pixels(scaled, subject.images, subject.grid).to(subject.images)
        there = np.concatenate(
            [
                subject.certainty_of(rows, seen[torch.from_numpy(rows)])
                for rows in np.split(every, range(batch_size, len(every), batch_size))
            ]
        )
        drop = np.divide(
            np.maximum(0, certain - there), certain, out=np.zeros_like(certain), where=certain > 0
        )
        again = min_max(subject.maps(seen, [method])[method].image.double())
        coherency = (_pearson(scaled.numpy(), again.numpy()) + 1) / 2
        complexity = scaled.mean(dim=1).numpy()
        values[:, number] = harmonic(coherency, 1 - complexity, 1 - drop), drop, coherency, complexity
    quantities = (
        Quantity("adcc", HIGH, 100),
        Quantity("average_drop", LOW, 100),
        Quantity("coherency", HIGH, 100),
        Quantity("complexity", LOW, 100),
    )
    return ScoreValues(quantities, tuple(maps), subject.sample_ids, values)


def min_max(relevance: Float[Tensor, "samples patches"]) -> Float[Tensor, "samples patches"]:
    """Each map scaled to [0, 1]; a constant one, which prefers nothing, to 1."""
    relevance = relevance.cpu()
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (relevance - low) / spread.where(spread > 0, 1), 1.0)


def harmonic(*parts: Float[np.ndarray, "samples"]) -> Float[np.ndarray, "samples"]:
    """The harmonic mean of numbers that are not negative; 0 where one of them is 0."""
    stacked = np.stack(parts)
    some = (stacked > 0).all(axis=0)
    inverse = np.divide(1.0, stacked, out=np.ones_like(stacked), where=stacked > 0)
    return np.where(some, len(parts) / inverse.sum(axis=0), 0.0)


def _pearson(
    first: Float[np.ndarray, "samples patches"], second: Float[np.ndarray, "samples patches"]
) -> Float[np.ndarray, "samples"]:
    first, second = (x - x.mean(axis=1, keepdims=True) for x in (first, second))
    sizes = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    constant = np.stack([size <= 1e-12 * np.sqrt(first.shape[1]) for size in sizes])
    product = np.where(constant.any(axis=0), 1.0, sizes[0] * sizes[1])
    correlation = np.clip((first * second).sum(axis=1) / product, -1, 1)
    return np.where(constant.all(axis=0), 1.0, np.where(constant.any(axis=0), 0.0, correlation))


def _over_pixels(
    patches: Float[Tensor, "samples patches"],
    images: Float[Tensor, "samples 3 height width"],
    grid: tuple[int, int],
) -> Float[Tensor, "samples 1 height width"]:
    """Every pixel with the value of its patch."""
    high, wide = patch_side(images, grid)
    down = (torch.arange(images.shape[2]) // high).clamp(max=grid[0] - 1)
    across = (torch.arange(images.shape[3]) // wide).clamp(max=grid[1] - 1)
    return patches.unflatten(1, grid)[:, down][:, :, across][:, None]
