"""Who wins on each model of a study, and who can't be told apart from the winner."""

from collections.abc import Sequence

import numpy as np

from clipmapper.evaluation.explanation_scores.values import HIGH
from clipmapper.evaluation.study.claims import CLAIMED
from clipmapper.evaluation.study.headline import is_ranked
from clipmapper.evaluation.study.tables import RESAMPLES, StudyCell


def winner_rows(cells: Sequence[StudyCell], *, confidence: float, seed: int) -> list[dict]:
    """For each section, quantity that ranks methods, and model (trained with one seed): the ``best`` method
    with its ``value``; ``level``, the others whose paired difference to it has an interval that holds 0; and
    ``over_weighted``, the best's difference to the paper's rule (None where that was not run).

    The winner is chosen on the samples that it is compared on, so that its lead is a little too large.
    """
    rows = []
    for cell in cells:
        its = cell.values
        for place, quantity in enumerate(its.quantities):
            chosen = its.scored(place)
            if not is_ranked(quantity) or not chosen.any():
                continue
            sign = 1 if quantity.better == HIGH else -1
            means = its.mean(place, chosen)
            drawn = its.drawn(place, chosen, resamples=RESAMPLES, seed=seed)
            best = int((sign * means).argmax())
            tail = (1 - confidence) / 2
            low, high = np.quantile(drawn[:, [best]] - drawn, [tail, 1 - tail], axis=0)
            level = [method for k, method in enumerate(its.methods) if k != best and low[k] <= 0 <= high[k]]
            over = None
            if CLAIMED in its.methods:
                k = its.methods.index(CLAIMED)
                over = {"mean": float(means[best] - means[k]), "low": float(low[k]), "high": float(high[k])}
            rows.append({
                "section": its.sections[place], "cell": cell.name, "quantity": quantity.name,
                "factor": quantity.factor, "samples": int(chosen.sum()), "best": its.methods[best],
                "value": float(means[best]), "level": level, "over_weighted": over,
            })  # fmt: skip
    return rows
