"""What a study takes of a report: every value of every sample, and how the samples can be grouped."""

from collections.abc import Mapping, Sequence

import numpy as np

from clipmapper.evaluation.explanation_scores.chosen import Scored
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.localisation import Localisation
from clipmapper.evaluation.localisation_values import localisation_values

LOCALISATION = "localisation"  # beside the names of scores


class Valued:
    """A part of :class:`~clipmapper.training.explained.Report`, by whose attributes it goes."""

    scored: Mapping[str, Scored]
    localisation: Mapping[str, Mapping[str, Localisation]]

    def groups(self) -> Mapping[str, Sequence[str]]:
        """Ways to group the samples, such as "family" → the group of each, "" where that is not known."""
        return {}

    def located(self) -> Mapping[str, Sequence[int]]:
        """What was looked for → the samples that the entries of ``localisation`` are of, by their place."""
        return {
            name: range(len(self.samples))
            for name, scores in next(iter(self.localisation.values()), {}).items()
            if len(scores.mass) == len(self.samples)
        }

    def values_by_test(self) -> dict[str, dict[str, ScoreValues]]:
        """What was tested, "" where that is one thing alone → score → the values of all samples.
        :data:`LOCALISATION` is one of the scores, NaN at samples without a truth."""
        located = self.located_values(self.localisation)
        return {"": {score: found.values for score, found in self.scored.items()} | located}

    def located_values(
        self, localisation: Mapping[str, Mapping[str, Localisation]]
    ) -> dict[str, ScoreValues]:
        """A part of the ``localisation``, or all of it, among scores; empty where nothing was looked for."""
        found = localisation_values(localisation, self.located(), np.array(self.samples.ids))
        return {} if found is None else {LOCALISATION: found}
