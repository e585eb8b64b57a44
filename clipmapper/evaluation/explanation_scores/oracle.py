"""How far a method comes from a random order to the best that removal could do.

An area means little by itself: how low can it be? A greedy oracle, which is no explanation, looks: at each
step it removes the token after whose removal the model's certainty is lowest (positive), or highest
(negative).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float

from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.values import HIGH, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import (
    FRACTIONS,
    ModalityRelevance,
    VariantScorer,
    kept_indices,
    number_removed,
    perturb,
)
from clipmapper.evaluation.perturbation_scores import DIRECTIONS
from clipmapper.evaluation.statistics import trapezoid_area

_RANDOM_ORDERS = 5  # whose mean stands for a random order


def oracle_share(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """Per modality and direction ``share`` = (random − method) / (random − oracle) of the mean areas: 0 as
    random, 1 as the greedy oracle, which a method may exceed; and ``gap`` over both directions, and
    modalities."""
    scorer = subject.certain()
    several = dict(maps)
    for number in range(_RANDOM_ORDERS):
        draws = {}
        for name in ("image", "text"):
            shape = getattr(next(iter(maps.values())), name).shape
            rows = [
                np.random.default_rng((seed, number, int(i))).random(shape[1]) for i in subject.sample_ids
            ]
            draws[name] = torch.from_numpy(np.stack(rows))
        several[f"random order {number}"] = ModalityRelevance(**draws)
    found = perturb(
        scorer,
        several,
        subject.removable_text,
        subject.text_valid,
        sample_ids=subject.sample_ids,
        modalities=subject.modalities,
        batch_size=batch_size,
        seed=seed,
    )
    areas = found.areas(subject.certainty)  # [modalities, directions, methods, samples]
    own, random = areas[:, :, : len(maps)], areas[:, :, len(maps) :].mean(axis=2, keepdims=True)
    best = np.stack(
        [
            [
                greedy_area(subject, scorer, modality, direction, batch_size, progress)
                for direction in DIRECTIONS
            ]
            for modality in subject.modalities
        ]
    )[:, :, None]
    # Of the negative direction a high area is good: with the sign turned both say how much is gained.
    sign = np.array([1.0, -1.0])[None, :, None, None]
    gained, possible = sign * (random - own), np.broadcast_to(sign * (random - best), own.shape)
    quantities, values = [], []

    def add(name: str, gain: Float[np.ndarray, "methods samples"], most: np.ndarray) -> None:
        quantities.append(Quantity(f"{name}share", HIGH, 100, over=f"{name}possible"))
        quantities.append(Quantity(f"{name}possible", NEITHER))
        values.extend([gain, most])

    for i, modality in enumerate(subject.modalities):
        for j, direction in enumerate(DIRECTIONS):
            add(f"{modality}/{direction}/", gained[i, j], possible[i, j])
        if len(subject.modalities) > 1:
            add(f"{modality}/", gained[i].mean(axis=0), possible[i].mean(axis=0))
    add("", gained.mean(axis=(0, 1)), possible.mean(axis=(0, 1)))
    return ScoreValues(tuple(quantities), tuple(maps), subject.sample_ids, np.stack(values))


def greedy_area(
    subject: Subject,
    scorer: VariantScorer,
    modality: str,
    direction: str,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "samples"]:
    """The area under the greedy oracle's curve, at the same fractions as a method's.

    Equal certainties: the first token goes. A sample of n tokens takes n (n + 1) / 2 forwards.
    """
    count = len(subject.sample_ids)
    if modality == "text":
        removable, valid = subject.removable_text.cpu().numpy(), subject.text_valid.cpu().numpy()
    else:
        removable = valid = np.ones((count, subject.grid[0] * subject.grid[1]), dtype=bool)
    kept, left = valid.copy(), removable.copy()
    total = removable.sum(axis=1)
    curve = np.empty((count, int(total.max()) + 1))
    curve[:, 0] = scorer.unperturbed(batch_size)[:, 0]
    sign = 1.0 if direction == "positive" else -1.0
    for step in range(1, curve.shape[1]):
        if progress is not None:
            progress(0)
        rows, tokens = np.nonzero(left)
        found = np.full(left.shape, np.inf)
        variants = kept[rows]
        variants[np.arange(len(rows)), tokens] = False
        for part in np.split(np.arange(len(rows)), range(batch_size, len(rows), batch_size)):
            keep = kept_indices(variants[part])
            keeps = (keep, None) if modality == "image" else (None, keep)
            found[rows[part], tokens[part]] = sign * scorer.score(rows[part], *keeps)[:, 0]
        going = np.flatnonzero(left.any(axis=1))
        token = found.argmin(axis=1)[going]
        kept[going, token] = left[going, token] = False
        curve[:, step] = curve[:, step - 1]
        curve[going, step] = sign * found[going, token]
    at = np.array(FRACTIONS)
    removed = np.stack([number_removed(f, total) for f in FRACTIONS], axis=1)
    return trapezoid_area(np.take_along_axis(curve, removed, axis=1), at)
