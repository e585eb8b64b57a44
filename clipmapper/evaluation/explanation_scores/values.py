"""The values of a score of explanations: one a sample, method and quantity, with intervals over samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from clipmapper.evaluation.statistics import Interval, resampled_means

HIGH, LOW, NEITHER = "high", "low", "neither"


@dataclass(frozen=True)
class Quantity:
    """One number that a score gives every sample.

    Attributes
    ----------
    name : within its score, such as ``image/positive/probability``.
    better : "high", "low", or "neither" for a number that only describes.
    factor : 100 for a share, which tables show in per cent.
    over : name of the quantity of the same score that it is a share of. Its value is then the mean over the
        samples divided by the mean of that one: a quotient of each sample would explode where that is near 0.
        A share of 0 is 0.
    """

    name: str
    better: str
    factor: int = 1
    over: str | None = None


@dataclass(frozen=True)
class ScoreValues:
    """The values of one score, of all its ``quantities``, by every method, at every sample."""

    quantities: tuple[Quantity, ...]
    methods: tuple[str, ...]
    sample_ids: Int[np.ndarray, "samples"]
    values: Float[np.ndarray, "quantities methods samples"]

    def of(self, quantity: str) -> Float[np.ndarray, "methods samples"]:
        """The values of one of the quantities, by name."""
        return self.values[self._place(quantity)]

    def _place(self, quantity: str) -> int:
        names = [one.name for one in self.quantities]
        if quantity not in names:
            raise ValueError(f"no quantity {quantity!r}: one of {', '.join(names)}")
        return names.index(quantity)

    def mean(self, quantity: Quantity) -> Float[np.ndarray, "methods"]:
        """The quantity's value over all samples, by method."""
        mean = self.of(quantity.name).mean(axis=1)
        return mean if quantity.over is None else _shares(mean, self.of(quantity.over).mean(axis=1))

    def intervals(
        self, reference: str | None = None, *, confidence: float, seed: int, resamples: int = 2000
    ) -> Float[np.ndarray, "quantities methods 3"]:
        """(value, low, high) of every quantity by every method, with percentile bootstrap intervals over the
        samples; with a ``reference`` those of the paired differences (method − reference).

        All come from the same resamples. Raises ValueError for values that are not finite.
        """
        drawn = self.resampled(reference, seed=seed, resamples=resamples)
        tail = (1 - confidence) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
        value = self._compared(self._columns.mean(axis=0)[None], reference)[0]
        return np.stack([value, low, high], axis=-1)

    def resampled(
        self, reference: str | None = None, *, seed: int, resamples: int = 2000
    ) -> Float[np.ndarray, "resamples quantities methods"]:
        """What :meth:`intervals` are of: the values over sets of samples that are drawn with replacement, the
        sets of :func:`~clipmapper.evaluation.statistics.resampled_means` for the same seed."""
        if not np.isfinite(self.values).all():
            raise ValueError("an interval needs finite values")
        return self._compared(resampled_means(self._columns, resamples, seed), reference)

    @property
    def _columns(self) -> Float[np.ndarray, "samples columns"]:
        return self.values.reshape(-1, self.values.shape[-1]).T

    def _compared(
        self, means: Float[np.ndarray, "sets columns"], reference: str | None
    ) -> Float[np.ndarray, "sets quantities methods"]:
        means = means.reshape(len(means), *self.values.shape[:2])
        over = [i if one.over is None else self._place(one.over) for i, one in enumerate(self.quantities)]
        is_share = np.array([one.over is not None for one in self.quantities])[:, None]
        means = np.where(is_share, _shares(means, means[:, over]), means)
        if reference is None:
            return means
        return means - means[:, :, [self.methods.index(reference)]]

    def numbers(self, *, confidence: float, seed: int, reference: str = "weighted") -> dict:
        """quantity → what is better, and method → interval and paired difference to ``reference``, where that
        was run, for ``results.json``."""
        own = self.intervals(confidence=confidence, seed=seed)
        compared = reference in self.methods
        paired = self.intervals(reference, confidence=confidence, seed=seed) if compared else own
        out: dict = {}
        for i, quantity in enumerate(self.quantities):
            by_method: dict = {}
            for k, method in enumerate(self.methods):
                entry = by_method[method] = {"value": Interval(*own[i, k].tolist()).as_dict()}
                if compared and method != reference:
                    difference = Interval(*paired[i, k].tolist())
                    entry[f"difference_to_{reference}"] = difference.as_dict()
            out[quantity.name] = {"better": quantity.better, "factor": quantity.factor, "methods": by_method}
        return out

    def part(
        self, methods: Sequence[str] | None = None, samples: Bool[np.ndarray, "samples"] | None = None
    ) -> "ScoreValues":
        """Those of some of the methods, and of some of the samples (None: all)."""
        methods = self.methods if methods is None else tuple(methods)
        values = self.values[:, [self.methods.index(method) for method in methods]]
        if samples is None:
            return ScoreValues(self.quantities, methods, self.sample_ids, values)
        return ScoreValues(self.quantities, methods, self.sample_ids[samples], values[:, :, samples])

    @classmethod
    def concatenate(cls, parts: "Sequence[ScoreValues]") -> "ScoreValues":
        """The samples of all parts, in order; ValueError where quantities or methods differ."""
        if not parts:
            raise ValueError("nothing to concatenate")
        first = parts[0]
        if any((part.quantities, part.methods) != (first.quantities, first.methods) for part in parts[1:]):
            raise ValueError("parts differ in their quantities or methods")
        return cls(
            first.quantities,
            first.methods,
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.values for part in parts], axis=2),
        )

    @classmethod
    def beside(cls, parts: "Mapping[str, ScoreValues]") -> "ScoreValues":
        """The quantities of several tests of the same samples, each named ``<test>/<quantity>``."""
        first = next(iter(parts.values()))
        for part in parts.values():
            if part.methods != first.methods or not np.array_equal(part.sample_ids, first.sample_ids):
                raise ValueError("parts differ in their methods or samples")
        quantities = tuple(
            Quantity(
                f"{test}/{one.name}",
                one.better,
                one.factor,
                None if one.over is None else f"{test}/{one.over}",
            )
            for test, part in parts.items()
            for one in part.quantities
        )
        values = np.concatenate([part.values for part in parts.values()])
        return cls(quantities, first.methods, first.sample_ids, values)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays of numbers and text, which numpy stores without pickle."""
        return {
            "names": np.array([one.name for one in self.quantities], dtype=np.str_),
            "better": np.array([one.better for one in self.quantities], dtype=np.str_),
            "factor": np.array([one.factor for one in self.quantities], dtype=np.int64),
            "over": np.array([one.over or "" for one in self.quantities], dtype=np.str_),
            "methods": np.array(self.methods, dtype=np.str_),
            "sample_ids": self.sample_ids,
            "values": self.values,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ScoreValues":
        """The inverse of `to_arrays`; raises KeyError for a missing array."""
        rows = zip(*(arrays[key].tolist() for key in ("names", "better", "factor", "over")), strict=True)
        return cls(
            tuple(Quantity(name, better, factor, over or None) for name, better, factor, over in rows),
            tuple(str(method) for method in arrays["methods"]),
            arrays["sample_ids"],
            arrays["values"],
        )


def _shares(values: Float[np.ndarray, "*any"], over: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return np.divide(values, over, out=np.zeros_like(values), where=over != 0)
