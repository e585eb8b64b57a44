"""Results of explanations by name, for ``results.json`` and the tables."""

from collections.abc import Mapping

import numpy as np

from clipmapper.evaluation.localisation import Localisation
from clipmapper.evaluation.perturbation_scores import PerturbationScores
from clipmapper.evaluation.statistics import bootstrap_interval

LOCALISATION_SCORES = ("mass", "rank", "pointing")


def perturbation_numbers(scores: PerturbationScores, confidence: float, seed: int) -> dict:
    """modality → direction → score → method → area, and the paired difference to the reference method."""
    out: dict = {}
    for row in scores.summary(confidence=confidence, seed=seed):
        entry: dict = {"area": row.area.as_dict()}
        if row.difference is not None:
            entry[f"difference_to_{row.reference}"] = row.difference.as_dict()
        place = out.setdefault(row.modality, {}).setdefault(row.direction, {})
        place.setdefault(row.score, {})[row.method] = entry
    return out


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
