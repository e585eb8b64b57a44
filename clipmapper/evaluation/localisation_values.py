"""Localisation as one more score of explanations: every value of every sample."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from clipmapper.evaluation.explanation_scores.values import HIGH, NEITHER, Quantity, ScoreValues
from clipmapper.evaluation.localisation import LOCALISATION_SCORES, Localisation


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
