"""Base classes that each task fills in: explanations, explained samples, and the report on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from clipmapper.data.images import input_size, seen_part
from clipmapper.data.pixels import normalised
from clipmapper.data.record import Record, resized, seen_mask
from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.chosen import REMOVAL, Scored
from clipmapper.evaluation.explanation_scores.sanity import unchanged
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.localisation import LOCALISATION_SCORES, Localisation, localisation_numbers
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, SCORES, PerturbationScores
from clipmapper.training.explained_values import Valued
from clipmapper.training.processes import Share
from clipmapper.training.shown import Cell, Media, MediaTable, Picture
from clipmapper.visual.curves import plot_perturbation_curves
from clipmapper.visual.layout import save_figure

# Two streams of random numbers of one seed have nothing in common if a number of its own goes with each.
DRAWN_QUESTIONS, DRAWN_IMAGES, DRAWN_WORDS = 0xE8, 0xCA, 0x30
LARGEST = 640  # pixels of the longer side of what is looked at: more than a page shows of it


def looked_at(
    records: Sequence[Record], reader: Callable[[Record], Tensor], visual: nn.Module
) -> tuple[list[UInt8[np.ndarray, "_ _ 3"]], Float[Tensor, "records 3 height width"]]:
    """The part of each image that ``visual`` (an ``open_clip`` image tower) sees, to be looked at, and the
    image as it reads it."""
    pictures, images = [], []
    for record in records:
        images.append(reader(record))
        picture = Image.fromarray(seen_part(record.pil(), visual))
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
    return pictures, normalised(torch.stack(images), visual)


def others_of(images: Sequence[str]) -> list[int]:
    """For each sample the next one, round in a circle, whose image is another; −1 where there is none."""
    count = len(images)
    return [
        next((j % count for j in range(i + 1, i + count) if images[j % count] != images[i]), -1)
        for i in range(count)
    ]


def whole_picture(record: Record) -> UInt8[np.ndarray, "height width 3"]:
    """An image to be looked at, whole and upright."""
    found = record.pil()
    found.thumbnail((LARGEST, LARGEST))
    return np.asarray(found)


def mask_of(record: Record, visual: nn.Module) -> Bool[np.ndarray, "rows columns"] | None:
    """The pixels that decide of the part that the image tower sees; None where they are not known.

    In the image's own pixels, so that scores by area are exact; but in no more than are looked at, and in no
    fewer than the tower reads, so that every patch has some.

    Raises ``UserError`` for a mask that can't be read, or is of another size than the image's.
    """
    try:
        mask = None if record.truth is None else record.truth.mask()
    except UserError as error:
        raise UserError(f"{record.source}: its mask: {error}") from error
    if mask is None:
        return None
    width, height = record.pil().size
    if mask.shape != (height, width):
        raise UserError(
            f"{record.source}: its mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x "
            f"{height}; a mask is as large as the image"
        )
    seen = seen_mask(mask, visual)
    scale = min(1.0, LARGEST / max(seen.shape))
    sides = zip(seen.shape, input_size(visual), strict=True)
    rows, columns = (max(round(scale * n), few) for n, few in sides)
    return resized(seen, (rows, columns))


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

    ``of_all``: the fields that have not. ``others``: for each sample, the place among all of them, whatever
    part this is, of one with another image, whose patches and words take the place of its own; −1 where there
    is none.
    """

    of_all: ClassVar[tuple[str, ...]] = ()
    ids: Sequence[int]
    others: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def digest(self) -> str:
        """Another one for other samples: a digest of what their scores depend on."""

    @abstractmethod
    def points(self, methods: int, scores: Sequence[str]) -> int:
        """How many points of curves a report on them by so many methods has, other scores by their weight."""

    def note(self) -> str | None:
        """A line about samples that cannot be scored. Raises ``UserError`` where there are no others."""
        return None

    def undecided(self) -> int:
        """How many of them have no known truth, what decides; planted maps need it of all."""
        return len(self)

    def part(self, share: Share) -> "Samples | None":
        """A run of samples one behind the other; None where there are fewer samples than shares."""
        rows = slice(len(self) * share.index // share.of, len(self) * (share.index + 1) // share.of)
        if rows.start == rows.stop:
            return None
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {k: value for k, value in values.items() if k not in self.of_all and value is not None}
        return replace(self, **{name: value[rows] for name, value in known.items()})


class Report(Valued, ABC):
    """Everything that is known about the methods on some samples.

    ``scored``: by the names of
    :data:`~clipmapper.settings.keys.EXPLANATION_SCORES`, those that were asked for.
    ``localisation``: method → what was looked for → scores. ``curves``: the picture of curves that says most.
    ``columns``: of the table of samples for loggers; the curves of each come behind them.
    """

    samples: Samples
    scored: Mapping[str, Scored]
    localisation: Mapping[str, Mapping[str, Localisation]]
    curves: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def numbers(self, confidence: float, seed: int) -> dict:
        """All results by name, for ``results.json``: areas, paired differences, localisation."""
        found = {
            "samples": len(self.samples),
            "confidence": confidence,
            "perturbation": self.perturbation_numbers(confidence, seed),
            "scores": {
                score: found.of_methods.numbers(confidence=confidence, seed=seed)
                for score, found in self.scored.items()
                if score != REMOVAL
            },
            "localisation": localisation_numbers(self.localisation, confidence, seed),
        }
        if "sanity" in self.scored:
            found["unchanged"] = unchanged(self.scored["sanity"].of_methods)
        return found

    def judged(self, confidence: float, seed: int) -> dict[str, dict]:
        """What was tested → ``samples``, and ``scores``: what each is worth
        (:func:`~clipmapper.evaluation.explanation_scores.judged.judge`). Raises ``UserError`` where it is not
        known of every sample what decides."""
        raise UserError("judged: this task's reports do not know what decides")

    @abstractmethod
    def perturbation_numbers(self, confidence: float, seed: int) -> dict:
        """Areas and paired differences by name, where tokens were removed."""

    @property
    @abstractmethod
    def tests(self) -> Mapping[str, Mapping[str, PerturbationScores]]:
        """The perturbation tests: score → what a picture's title says was tested → curves."""

    @property
    @abstractmethod
    def sampled_score(self) -> str:
        """The score of the first of the tests by which the curves of a single sample are drawn."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """The numbers worth a curve over training, by name."""

    @staticmethod
    @abstractmethod
    def tables(numbers: Mapping) -> list[Table]:
        """The :meth:`numbers` to be printed."""

    @abstractmethod
    def explanation(self, number: int) -> tuple[str, Figure]:
        """The picture of a sample, and a part of its file's name."""

    @abstractmethod
    def comparison(self, number: int) -> Figure:
        """The methods side by side on a sample."""

    @abstractmethod
    def cells(self, number: int, picture: Path) -> Sequence[Cell]:
        """What the ``columns`` say of a sample. ``picture``: the file of its :meth:`explanation`."""

    def write(self, folder: Path, *, count: int, confidence: float) -> list[Path]:
        """Heat maps of the first ``count`` samples, one comparison of methods, and the curves."""
        written = []
        for number in range(min(count, len(self.samples))):
            name, figure = self.explanation(number)
            name = "_".join(filter(None, ("explanation", f"{number:02d}", name)))
            written.append(save_figure(figure, folder / f"{name}.png"))
        if count:
            written.append(save_figure(self.comparison(0), folder / "methods.png"))
        for test, by_title in self.tests.items():
            how, part = ("", "") if test == REMOVAL else (f" ({test})", f"{test}_")
            done = _done(test)
            for tested, scores in by_title.items():
                for score in scores.scores:
                    figure = _curves(scores, score, f"Perturbation test{how}, {tested}", confidence, done)
                    written.append(save_figure(figure, folder / f"perturbation_{part}{score}.png"))
        return written

    def media(self, folder: Path) -> Media:
        """The pictures that :meth:`write` has left in ``folder``, and a table of the samples that are drawn,
        for loggers that take them."""
        test, by_title = next(iter(self.tests.items()), (REMOVAL, {}))
        first, done = next(iter(by_title.values()), None), _done(test)
        columns, rows = [*self.columns, *(["curves"] if first is not None else [])], []
        for path in sorted(folder.glob("explanation_*.png")):
            number = int(path.stem.split("_")[1])
            cells = [*self.cells(number, path)]
            if first is not None:
                figure = _sample_curves(first, self.sampled_score, number, done)
                cells.append(Picture(save_figure(figure, folder / "curves" / path.name)))
            rows.append(dict(zip(columns, cells, strict=True)))
        pictures = [folder / "methods.png", *sorted(folder.glob("perturbation_*.png"))]
        shown = {f"pictures/{path.stem}": Picture(path) for path in pictures if path.exists()}
        return {"explanations": MediaTable(columns, rows)} | shown

    @classmethod
    @abstractmethod
    def together(cls, samples: Samples, reports: Sequence["Report"]) -> "Report":
        """The report on ``samples`` from those on the parts of them, in order."""

    def score_scalars(self) -> dict[str, float]:
        """Values of all scores but removal, whose areas have names of their own."""
        return {
            f"scores/{score}/{quantity.name}/{method}": float(value)
            for score, found in self.scored.items()
            if score != REMOVAL
            for values in [found.of_methods]
            for quantity in values.quantities
            for method, value in zip(values.methods, values.mean(quantity), strict=True)
        }

    def localisation_scalars(self) -> dict[str, float]:
        """Means over the samples."""
        return {
            f"localisation/{name}/{score}/{method}": float(getattr(scores, score).mean())
            for method, by_name in self.localisation.items()
            for name, scores in by_name.items()
            for score in LOCALISATION_SCORES
        }


def _done(test: str) -> str:
    """The participle of a test: all tests but that of removal replace what they take."""
    return "removed" if test == REMOVAL else "replaced"


def _curves(scores: PerturbationScores, score: str, title: str, confidence: float, done: str) -> Figure:
    areas = scores.areas(score).mean(axis=-1)
    return plot_perturbation_curves(
        scores.curves(score, confidence=confidence),
        scores.fractions.tolist(),
        ylabel=SCORES[score].axis,
        areas=_panels(scores, areas),
        title=title,
        what_is_done=done,
    )


def _sample_curves(scores: PerturbationScores, score: str, number: int, done: str) -> Figure:
    """The curves of one sample (an interval of one sample is the sample itself)."""
    panels = _panels(scores, scores.score(score)[..., number, :])
    curves = {panel: {m: (line, line, line) for m, line in lines.items()} for panel, lines in panels.items()}
    return plot_perturbation_curves(
        curves, scores.fractions.tolist(), ylabel=SCORES[score].axis, what_is_done=done
    )


def _panels(scores: PerturbationScores, values: np.ndarray) -> dict[str, dict[str, Any]]:
    """``values`` of modalities, directions and methods, by the panel that they are drawn in and by method."""
    return {
        f"{modality}/{direction}": dict(zip(scores.methods, values[i][j], strict=True))
        for i, modality in enumerate(scores.modalities)
        for j, direction in enumerate(DIRECTIONS)
    }


def joined(parts: Sequence[Sequence]) -> list:
    """Lists, one behind the other."""
    return [one for part in parts for one in part]


def joined_scored(parts: Sequence[Scored]) -> Scored:
    """One score's values and curves, of parts."""
    curves = [part.curves for part in parts if part.curves is not None]
    values = ScoreValues.concatenate([part.values for part in parts])
    return Scored(values, PerturbationScores.concatenate(curves) if curves else None)


def joined_localisation(reports: Sequence[Report]) -> dict[str, dict[str, Localisation]]:
    """The localisation of parts; what a part did not look for is missing from it."""
    parts = [report.localisation for report in reports]
    return {
        method: {
            name: Localisation.concatenate([part[method][name] for part in having])
            for name in sorted({name for part in parts for name in part[method]})
            if (having := [part for part in parts if name in part[method]])
        }
        for method in parts[0]
    }
