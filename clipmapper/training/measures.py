"""Scores of samples as functions of means over them: intervals, paired differences, their table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from clipmapper.errors import visible
from clipmapper.evaluation.statistics import Interval, bootstrap_interval, bootstrap_score

OVERALL = "overall"


def _first(means: np.ndarray) -> Any:
    return means[..., 0]


@dataclass(frozen=True)
class Measure:
    """A score of some samples that is a function of means over them.

    ``value``: as a training run has it, to the digit. ``columns``: the numbers of each sample. ``score``: of
    means of the columns; where it is not given there is one column, and its mean is the score.
    """

    value: float
    columns: Float[np.ndarray, "samples columns"]
    score: Callable[[np.ndarray], Any] = _first

    def interval(self, confidence: float, seed: int) -> Interval:
        found = self._interval(self.columns, self.score, confidence, seed)
        # The value may have been rounded to float32.
        return Interval(self.value, min(found.low, self.value), max(found.high, self.value))

    def difference(self, other: "Measure", confidence: float, seed: int) -> Interval:
        """This score less another of the same samples, which are drawn together."""
        count, score = self.columns.shape[1], self.score
        if score is other.score is _first:
            return self._interval(self.columns - other.columns, _first, confidence, seed)

        def differ(means: np.ndarray) -> Any:
            return score(means[..., :count]) - other.score(means[..., count:])

        both = np.concatenate([self.columns, other.columns], axis=1)
        return self._interval(both, differ, confidence, seed)

    @staticmethod
    def _interval(columns: np.ndarray, score: Callable, confidence: float, seed: int) -> Interval:
        if score is _first:
            return bootstrap_interval(columns[:, 0], confidence=confidence, seed=seed)
        return bootstrap_score(columns, score, confidence=confidence, seed=seed)


Measures = Mapping[str, Mapping[str, Measure]]  # by group (OVERALL, and each family) and by score


def intervals(measures: Measures, confidence: float, seed: int) -> dict:
    """For ``results.json``: group → how many samples, and the interval of each score."""
    return {
        group: {"samples": len(next(iter(of_group.values())).columns)}
        | {name: measure.interval(confidence, seed).as_dict() for name, measure in of_group.items()}
        for group, of_group in measures.items()
    }


def differences(measures: Measures, reference: Measures, confidence: float, seed: int) -> dict:
    """For ``results.json``: group → score → the interval of its difference to that of another model."""
    return {
        group: {
            name: measure.difference(reference[group][name], confidence, seed).as_dict()
            for name, measure in of_group.items()
        }
        for group, of_group in measures.items()
    }


def scores_table(
    results: Mapping, titles: Mapping[str, tuple[str, int]], noun: str, confidence: float
) -> Table:
    """Scores of all models by group, and paired differences to the first of them. ``titles`` and ``noun``: of
    :class:`clipmapper.training.evaluated.Evaluation`."""
    models = results["models"]
    table = Table(title=f"{results['split']}, {100 * confidence:g} % intervals", title_justify="left")
    table.add_column("of")
    table.add_column(noun, justify="right")
    for name in models:
        table.add_column(visible(name), justify="right")
        if name in results.get("differences", ()):
            table.add_column("difference", justify="right")
    scores = {name: model["scores"] for name, model in models.items()}
    first = next(iter(scores.values()))
    for group in (*(name for name in first if name != OVERALL), OVERALL):
        for score in (name for name in first[group] if name != "samples"):
            title, factor = titles[score]
            what = title if len(titles) > 1 else ""
            label = ", ".join(filter(None, (group.replace("_", " "), what)))
            cells = []
            for name in models:
                cells.append(_cell(scores[name][group][score], factor))
                if name in results.get("differences", ()):
                    cells.append(_cell(results["differences"][name][group][score], factor, signed=True))
            style = "bold" if group == OVERALL else None
            table.add_row(label, str(first[group]["samples"]), *cells, style=style)
    if len(models) > 1:
        table.caption = f"difference: to {next(iter(models))}, of the same {noun} (paired)"
        table.caption_justify = "left"
    return table


def _cell(interval: Mapping, factor: int, signed: bool = False) -> str:
    digits = 1 if factor == 100 else 2
    sign = "+" if signed else ""
    mean, low, high = (f"{factor * interval[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
