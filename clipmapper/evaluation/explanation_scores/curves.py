"""The perturbation test as a score: areas under curves, and the gap between them."""

from collections.abc import Callable, Mapping

import numpy as np

from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.values import HIGH, LOW, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import ModalityRelevance, perturb
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, LOG_PROBABILITY, SCORES, PerturbationScores


def curves(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    modalities: tuple[str, ...],
    *,
    replacement: str | None,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> PerturbationScores:
    """Every method's curves where tokens are removed, or replaced."""
    return perturb(
        subject.scorer(replacement),
        maps,
        subject.removable_text,
        subject.text_valid,
        sample_ids=subject.sample_ids,
        modalities=modalities,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def area_values(found: PerturbationScores) -> ScoreValues:
    """The areas under all curves, and every score's gap: negative less positive area.

    ``gap/…`` is the mean over modalities. A gap is 0 in the mean for a random order. ``reversed/…`` is the
    share of the fractions (but none and all) at which more is left without the most relevant tokens than
    without the least relevant ones: there the order is the wrong way round. Of a log-probability, which has
    no lower end, the areas are also taken above what it is without any token (``…/above_end``): a model that
    says with confidence that there is nothing falls below that, and an area from 0 would reward it.
    *Insertion*, for those who look for it: the negative curve is the insertion curve read from right to left,
    and its area is the negative one.
    """
    quantities, values = [], []
    for score in found.scores:
        areas = found.areas(score)  # [modalities, directions, methods, samples]
        factor = SCORES[score].factor if score in SCORES else 1
        for i, modality in enumerate(found.modalities):
            for j, direction in enumerate(DIRECTIONS):
                better = LOW if direction == "positive" else HIGH
                quantities.append(Quantity(f"{modality}/{direction}/{score}", better, factor))
                values.append(areas[i, j])
                if score == LOG_PROBABILITY:
                    quantities.append(Quantity(f"{modality}/{direction}/{score}/above_end", better, factor))
                    values.append(areas[i, j] - found.score(score)[i, j, :, :, -1])
            quantities.append(Quantity(f"{modality}/gap/{score}", HIGH, factor))
            values.append(areas[i, 1] - areas[i, 0])
            positive, negative = found.score(score)[i, :, :, :, 1:-1]
            quantities.append(Quantity(f"{modality}/reversed/{score}", LOW, 100))
            values.append((negative < positive).mean(axis=-1))
        if len(found.modalities) > 1:
            quantities.append(Quantity(f"gap/{score}", HIGH, factor))
            values.append((areas[:, 1] - areas[:, 0]).mean(axis=0))
    return ScoreValues(tuple(quantities), found.methods, found.sample_ids, np.stack(values))
