"""The claim of the paper on weighted relevance accumulation, held against a study: is ``weighted`` better?"""

from collections.abc import Sequence

import numpy as np

from clipmapper.evaluation.explanation_scores.values import HIGH
from clipmapper.evaluation.study.headline import is_claimed
from clipmapper.evaluation.study.tables import RESAMPLES, StudyCell

CLAIMED = "weighted"
AGAINST = ("gae", "rollout", "raw_attention", "grad_cam")
BETTER, LEVEL, WORSE = "better", "level", "worse"


def claim_rows(cells: Sequence[StudyCell], *, confidence: float, seed: int) -> list[dict]:
    """For each section, model and area where tokens were removed: the paired difference of ``weighted`` to
    each of the others that was run, the mean over the model's seeds, and the verdict by its interval.

    A difference whose interval holds 0 is level. Empty without ``weighted``.
    """
    rows = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        first = mine[0].values
        if CLAIMED not in first.methods:
            continue
        for place, quantity in enumerate(first.quantities):
            if is_claimed(quantity):
                section = first.sections[place]
                against = _against(mine, section, quantity.name, quantity.better == HIGH, confidence, seed)
                rows.append({
                    "section": section, "model": model, "quantity": quantity.name, "better": quantity.better,
                    "factor": quantity.factor, "against": against,
                })  # fmt: skip
    return rows


def _against(
    cells: Sequence[StudyCell], section: str, name: str, high: bool, confidence: float, seed: int
) -> dict[str, dict]:
    means, drawn = [], []
    for cell in cells:
        place = cell.values.place(section, name)
        chosen = cell.values.scored(place)
        means.append(cell.values.mean(place, chosen))
        drawn.append(cell.values.drawn(place, chosen, resamples=RESAMPLES, seed=seed))
    mean, sets = np.mean(means, axis=0), np.mean(drawn, axis=0)
    methods = cells[0].values.methods
    own, tail, found = methods.index(CLAIMED), (1 - confidence) / 2, {}
    for other in (method for method in AGAINST if method in methods):
        its = methods.index(other)
        low, up = (float(end) for end in np.quantile(sets[:, own] - sets[:, its], [tail, 1 - tail]))
        clear = 1 if low > 0 else -1 if up < 0 else 0
        verdict = LEVEL if not clear else BETTER if (clear > 0) == high else WORSE
        found[other] = {"mean": float(mean[own] - mean[its]), "low": low, "high": up, "verdict": verdict}
    return found
