"""Results of a perturbation test: curves, areas, intervals, files of them, and the names of its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipmapper.evaluation.statistics import Interval, bootstrap_intervals, trapezoid_area

MODALITIES = ("image", "text")
DIRECTIONS = ("positive", "negative")


@dataclass(frozen=True)
class AreaRow:
    """Area under one method's mean curve, and how far it is from the reference method's (method − reference).

    `difference` and `reference` are None without a reference, and for the reference itself.
    """

    modality: str
    direction: str
    score: str
    method: str
    area: Interval
    difference: Interval | None
    reference: str | None


@dataclass(frozen=True)
class PerturbationScores:
    """Per-sample curves. Axis `directions` is (positive, negative); `fractions` are the shares removed.

    `scores` names what was scored (:class:`~clipmapper.evaluation.perturbation.VariantScorer`).
    """

    methods: tuple[str, ...]
    modalities: tuple[str, ...]
    scores: tuple[str, ...]
    fractions: Float[np.ndarray, "fractions"]
    sample_ids: Int[np.ndarray, "samples"]
    values: Float[np.ndarray, "scores modalities directions methods samples fractions"]

    def score(self, score: str) -> Float[np.ndarray, "modalities directions methods samples fractions"]:
        """The curves of one of the `scores`."""
        if score not in self.scores:
            raise ValueError(f"no score {score!r}: one of {', '.join(self.scores)}")
        return self.values[self.scores.index(score)]

    def areas(self, score: str) -> Float[np.ndarray, "modalities directions methods samples"]:
        """Area under every sample's curve by the trapezoid rule over the fraction axis."""
        return trapezoid_area(self.score(score), self.fractions)

    def part(self, methods: Sequence[str]) -> "PerturbationScores":
        """The curves of some of the methods."""
        places = [self.methods.index(method) for method in methods]
        return replace(self, methods=tuple(methods), values=self.values[:, :, :, places])

    def summary(
        self, *, confidence: float = 0.95, seed: int = 0, reference: str | None = None
    ) -> list[AreaRow]:
        """One row per modality, direction, score and method, with bootstrap intervals over the samples.

        `reference` is the method of the paired differences (default: "weighted" where it was run). Raises
        ValueError for a reference that was not run.
        """
        if reference is None and "weighted" in self.methods:
            reference = "weighted"
        if reference is not None and reference not in self.methods:
            raise ValueError(f"reference {reference!r} was not run: one of {', '.join(self.methods)}")
        # [scores, modalities, directions, methods, samples]; all columns share one resampling of the samples.
        areas = np.stack([self.areas(score) for score in self.scores])
        columns = areas.reshape(-1, areas.shape[-1]).T
        names = [
            (score, modality, direction, method)
            for score in self.scores
            for modality in self.modalities
            for direction in DIRECTIONS
            for method in self.methods
        ]
        area = bootstrap_intervals(columns, confidence=confidence, seed=seed)
        difference: list[Interval | None] = [None] * len(names)
        if reference is not None:
            at = self.methods.index(reference)
            paired = (areas - areas[:, :, :, at : at + 1]).reshape(-1, areas.shape[-1]).T
            difference = list(bootstrap_intervals(paired, confidence=confidence, seed=seed))
        rows = []
        for (score, modality, direction, method), its_area, its_difference in zip(
            names, area, difference, strict=True
        ):
            compared = reference is not None and method != reference
            against = (its_difference, reference) if compared else (None, None)
            rows.append(AreaRow(modality, direction, score, method, its_area, *against))
        return rows

    def curves(
        self, score: str, *, confidence: float = 0.95, seed: int = 0
    ) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Mean, low and high at each fraction, for plotting: `curves["image/positive"]["weighted"]`."""
        values = np.moveaxis(self.score(score), 3, 0)  # samples first: all points share one resampling
        points = bootstrap_intervals(values.reshape(len(values), -1), confidence=confidence, seed=seed)
        ends = np.array([(point.mean, point.low, point.high) for point in points])
        ends = ends.reshape(*values.shape[1:], 3)
        return {
            f"{modality}/{direction}": {
                method: (ends[m, d, k, :, 0], ends[m, d, k, :, 1], ends[m, d, k, :, 2])
                for k, method in enumerate(self.methods)
            }
            for m, modality in enumerate(self.modalities)
            for d, direction in enumerate(DIRECTIONS)
        }

    @classmethod
    def concatenate(cls, parts: "Sequence[PerturbationScores]") -> "PerturbationScores":
        """The samples of all parts, in order; ValueError where methods, modalities, scores or fractions
        differ."""
        if not parts:
            raise ValueError("nothing to concatenate")
        first = parts[0]
        for part in parts[1:]:
            same = all(getattr(part, k) == getattr(first, k) for k in ("methods", "modalities", "scores"))
            if not (same and np.array_equal(part.fractions, first.fractions)):
                raise ValueError("parts differ in their methods, modalities, scores or fractions")
        return cls(
            first.methods,
            first.modalities,
            first.scores,
            first.fractions,
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.values for part in parts], axis=4),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays of numbers and text, which numpy stores without pickle."""
        return {
            "methods": np.array(self.methods, dtype=np.str_),
            "modalities": np.array(self.modalities, dtype=np.str_),
            "scores": np.array(self.scores, dtype=np.str_),
            "fractions": self.fractions,
            "sample_ids": self.sample_ids,
            "values": self.values,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PerturbationScores":
        """The inverse of `to_arrays`; raises KeyError for a missing array."""
        return cls(
            *(tuple(str(name) for name in arrays[k]) for k in ("methods", "modalities", "scores")),
            arrays["fractions"],
            arrays["sample_ids"],
            arrays["values"],
        )


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


class ScoreName(NamedTuple):
    """``title``: in tables. ``axis``: of a curve. ``factor``: 100 for a share, which tables show in per
    cent."""

    title: str
    axis: str
    factor: int


LOG_PROBABILITY, MEAN_PROBABILITY = "log_probability", "mean_probability"
WORD_PROBABILITY = "word_probability"
SCORES = {
    "accuracy": ScoreName("soft accuracy (%)", "soft accuracy", 100),
    "probability": ScoreName(
        "probability of the predicted answer (%)", "probability of the predicted answer", 100
    ),
    LOG_PROBABILITY: ScoreName("log-probability (nats)", "log-probability of the caption (nats)", 1),
    MEAN_PROBABILITY: ScoreName("mean probability of its tokens (%)", "geometric mean of probabilities", 100),
    WORD_PROBABILITY: ScoreName("probability (%)", "probability of the word", 100),
    **{f"bleu_{n}": ScoreName(f"BLEU-{n} (%)", f"BLEU-{n} of single captions", 100) for n in range(1, 5)},
    "rouge_l": ScoreName("ROUGE-L (%)", "ROUGE-L", 100),
    "cider": ScoreName("CIDEr-D", "CIDEr-D", 1),
    "meteor": ScoreName("METEOR (%)", "METEOR", 100),
    "spice": ScoreName("SPICE (%)", "SPICE", 100),
}
