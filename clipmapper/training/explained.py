"""Base classes that each task fills in: explanations, explained samples, and the report on them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from rich.table import Table
from rich.text import Text

from clipmapper.evaluation.localisation import LOCALISATION_SCORES, Localisation
from clipmapper.training.media import Media
from clipmapper.training.processes import Share


@runtime_checkable
class Explanation(Protocol):
    """Why a model says what it says about one image.

    ``patches``: relevance of the image's patches. ``image``: what the model saw of it, at the image's own
    resolution. ``words``: the words that are shown with a map, each with its relevance.
    """

    method: str
    patches: Float[np.ndarray, "rows columns"]
    image: UInt8[np.ndarray, "height width 3"]

    @property
    def word_scores(self) -> Sequence[tuple[str, float]]: ...

    @property
    def header(self) -> dict[str, str | None]:
        """``question`` and ``answer`` of a picture that compares methods."""

    @property
    def names(self) -> Sequence[str]:
        """The texts by which a picture's file is named."""

    def lines(self) -> Sequence[tuple[str | Text, ...]]:
        """Lines that ``clipmapper explain`` prints."""

    def plot(self, path: str | Path) -> Path:
        """Write a picture; returns its path."""


class Samples(ABC):
    """Samples to be explained, in a fixed order: a dataclass whose fields have an entry a sample.

    ``of_all``: the fields that have not.
    """

    of_all: ClassVar[tuple[str, ...]] = ()
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def digest(self) -> str:
        """Another one for other samples: a digest of what their scores depend on."""

    @abstractmethod
    def points(self, methods: int) -> int:
        """How many points of curves a report on them by so many methods has."""

    def note(self) -> str | None:
        """A line about samples that cannot be scored. Raises ``UserError`` where there are no others."""
        return None

    def part(self, share: Share) -> "Samples | None":
        """A run of samples one behind the other; None where there are fewer samples than shares."""
        rows = slice(len(self) * share.index // share.of, len(self) * (share.index + 1) // share.of)
        if rows.start == rows.stop:
            return None
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {k: value for k, value in values.items() if k not in self.of_all and value is not None}
        return replace(self, **{name: value[rows] for name, value in known.items()})


class Report(ABC):
    """Everything that is known about the methods on some samples.

    ``localisation``: method → what was looked for → scores. ``curves``: the picture of curves that says most.
    """

    samples: Samples
    localisation: Mapping[str, Mapping[str, Localisation]]
    curves: ClassVar[str]

    @abstractmethod
    def numbers(self, confidence: float, seed: int) -> dict:
        """All results by name, for ``results.json``: areas, paired differences, localisation."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """The numbers worth a curve over training, by name."""

    @staticmethod
    @abstractmethod
    def tables(numbers: Mapping) -> list[Table]:
        """The :meth:`numbers` to be printed."""

    @abstractmethod
    def write(self, folder: Path, *, count: int, confidence: float) -> list[Path]:
        """Heat maps of the first ``count`` samples, one comparison of methods, and the curves."""

    @abstractmethod
    def media(self, folder: Path) -> Media:
        """The pictures that :meth:`write` has left in ``folder``, and a table of the samples that are drawn,
        for loggers that take them."""

    @classmethod
    @abstractmethod
    def together(cls, samples: Samples, reports: Sequence["Report"]) -> "Report":
        """The report on ``samples`` from those on the parts of them, in order."""

    def localisation_scalars(self) -> dict[str, float]:
        """Means over the samples."""
        return {
            f"localisation/{name}/{score}/{method}": float(getattr(scores, score).mean())
            for method, by_name in self.localisation.items()
            for name, scores in by_name.items()
            for score in LOCALISATION_SCORES
        }


def joined(parts: Sequence[Sequence]) -> list:
    """Lists, one behind the other."""
    return [one for part in parts for one in part]


def joined_localisation(reports: Sequence[Report]) -> dict[str, dict[str, Localisation]]:
    """The localisation of parts; what a part did not look for is missing from it."""
    parts = [report.localisation for report in reports]
    return {
        method: {
            name: Localisation(
                *(
                    np.concatenate([getattr(part[method][name], score.name) for part in having])
                    for score in fields(Localisation)
                )
            )
            for name in sorted({name for part in parts for name in part[method]})
            if (having := [part for part in parts if name in part[method]])
        }
        for method in parts[0]
    }
