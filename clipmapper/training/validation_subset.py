"""The fixed part of every validation split that is scored, for data whose validation would take too long."""

import zlib
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np


@runtime_checkable
class Split(Protocol):
    """What has samples, some of which can be taken."""

    def __len__(self) -> int: ...

    def take(self: "_Split", places: np.ndarray) -> "_Split": ...


_Split = TypeVar("_Split", bound=Split)


class ValidationSubset:
    """At most ``samples`` of every validation split, drawn by ``seed`` and the split's name; None: all.

    The same in every process, at every validation (the last one too) and in a resumed run. ``counts``: name →
    how many are scored and how many there are; empty where nothing was said of samples.
    """

    def __init__(self, samples: int | None, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.counts: dict[str, tuple[int, int]] = {}

    def of(self, name: str, split: _Split) -> _Split:
        """The samples of a split that are scored, in the split's order."""
        if self.samples is None:
            return split
        count = len(split)
        self.counts[name] = min(self.samples, count), count
        if self.samples >= count:
            return split
        rng = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        return split.take(np.sort(rng.choice(count, self.samples, replace=False)))

    def lines(self) -> list[str]:
        """What a run says about it."""
        return [
            f"{name}: {drawn:,} of {count:,} samples are scored (training.validation_samples)"
            for name, (drawn, count) in self.counts.items()
        ]

    def numbers(self) -> dict[str, dict[str, int]]:
        """The same for ``results.json``."""
        return {name: {"samples": drawn, "of": count} for name, (drawn, count) in self.counts.items()}
