"""Every value that a study has of one model: of all scores, methods and samples, and what is known of each
sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from clipmapper.evaluation.explanation_scores.values import Quantity, ScoreValues
from clipmapper.evaluation.statistics import resampled_means


@dataclass(frozen=True)
class StudyValues:
    """All scores of one model side by side.

    Attributes
    ----------
    quantities : named ``<score>/<quantity>``.
    sections : what each quantity is of: the answers of a model, captions, or single words of them. Tables
        and rankings are of one section.
    groups : way to group samples ("family") → the group of each sample, "" where that is not known.
    values : NaN where a sample was not scored, by any method.
    """

    quantities: tuple[Quantity, ...]
    sections: tuple[str, ...]
    methods: tuple[str, ...]
    sample_ids: Int[np.ndarray, "samples"]
    groups: Mapping[str, Sequence[str]]
    values: Float[np.ndarray, "quantities methods samples"]

    def place(self, section: str, name: str) -> int:
        """Where a quantity stands; ValueError where there is none of that name."""
        for number, one in enumerate(self.quantities):
            if (self.sections[number], one.name) == (section, name):
                return number
        raise ValueError(f"no quantity {name!r} of {section}")

    def scored(self, place: int) -> Bool[np.ndarray, "samples"]:
        """The samples that have this quantity."""
        return np.isfinite(self.values[place]).all(axis=0)

    def parts(
        self, place: int, chosen: Bool[np.ndarray, "samples"]
    ) -> tuple[Float[np.ndarray, "chosen methods"], Float[np.ndarray, "chosen methods"] | None]:
        """The values of the chosen samples, and of a share what its mean is divided by the mean of."""
        one = self.quantities[place]
        own = self.values[place][:, chosen].T.astype(np.float64)
        if one.over is None:
            return own, None
        over = self.place(self.sections[place], one.over)
        return own, self.values[over][:, chosen].T.astype(np.float64)

    def mean(self, place: int, chosen: Bool[np.ndarray, "samples"]) -> Float[np.ndarray, "methods"]:
        """The value of every method over the chosen samples."""
        own, over = self.parts(place, chosen)
        return own.mean(axis=0) if over is None else _divided(own.mean(axis=0), over.mean(axis=0))

    def drawn(
        self, place: int, chosen: Bool[np.ndarray, "samples"], *, resamples: int, seed: int
    ) -> Float[np.ndarray, "sets methods"]:
        """The same of resamples of these samples, the same ones for every method, and for every model with
        equally many samples."""
        own, over = self.parts(place, chosen)
        if over is None:
            return resampled_means(own, resamples, seed)
        both = resampled_means(np.concatenate([own, over], axis=1), resamples, seed)
        return _divided(both[:, : own.shape[1]], both[:, own.shape[1] :])

    def grouped(self, scored: Bool[np.ndarray, "samples"]) -> Iterator[tuple[str, str, np.ndarray]]:
        """(way to group, group, which samples) of all groups that have scored samples."""
        for way, labels in self.groups.items():
            labels = np.array(labels)
            for label in sorted(set(labels[scored]) - {""}):
                yield way, str(label), scored & (labels == label)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays of numbers and text, which numpy stores without pickle."""
        arrays = ScoreValues(
            self.quantities, self.methods, self.sample_ids, self.values.astype(np.float32)
        ).to_arrays()
        arrays["sections"] = np.array(self.sections, dtype=np.str_)
        for way, labels in self.groups.items():
            arrays[f"group/{way}"] = np.array(labels, dtype=np.str_)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "StudyValues":
        """The inverse of `to_arrays`; raises KeyError for a missing array."""
        found = ScoreValues.from_arrays(arrays)
        return cls(
            found.quantities,
            tuple(arrays["sections"].tolist()),
            found.methods,
            found.sample_ids,
            {
                name.removeprefix("group/"): arrays[name].tolist()
                for name in arrays
                if name.startswith("group/")
            },
            found.values,
        )


def side_by_side(
    parts: Sequence[tuple[str, str, ScoreValues]],
    sample_ids: Int[np.ndarray, "samples"],
    groups: Mapping[str, Sequence[str]],
) -> StudyValues:
    """The values of several scores, each (section, score, values) of the first of ``sample_ids``, or of all.

    Raises ValueError where methods differ, or samples that come first.
    """
    methods = parts[0][2].methods
    quantities, sections, values = [], [], []
    for section, score, found in parts:
        count = len(found.sample_ids)
        if found.methods != methods or not np.array_equal(found.sample_ids, sample_ids[:count]):
            raise ValueError(f"{score}: other methods or samples")
        for one in found.quantities:
            over = None if one.over is None else f"{score}/{one.over}"
            quantities.append(Quantity(f"{score}/{one.name}", one.better, one.factor, over))
            sections.append(section)
        filled = np.full((len(found.quantities), len(methods), len(sample_ids)), np.nan, np.float32)
        filled[:, :, :count] = found.values
        values.append(filled)
    return StudyValues(
        tuple(quantities), tuple(sections), methods, sample_ids, groups, np.concatenate(values)
    )


def _divided(means: np.ndarray, over: np.ndarray) -> np.ndarray:
    """0 / 0, where nothing could be gained, is nothing."""
    return np.divide(means, over, out=np.zeros_like(means), where=over != 0)
