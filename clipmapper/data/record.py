"""The record that every data set is turned into, the truth that it may know, and problems with it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import nn

from clipmapper.data.images import as_pil, seen_part
from clipmapper.errors import UserError, UserErrors


@runtime_checkable
class Truth(Protocol):
    """Both may be None, where only the other is known. ``words``: those whose change would change what is
    asked."""

    words: tuple[str, ...] | None

    def mask(self) -> Bool[np.ndarray, "height width"] | None:
        """True at the pixels of the image that decide. Raises ``UserError`` for a file that can't be read."""


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A picture of the size of the image that is black where nothing decides. Transparency says nothing."""

    path: Path

    @property
    def words(self) -> None:
        return None

    def mask(self) -> Bool[np.ndarray, "height width"]:
        """Raises ``UserError`` for a file that is none, and for one that is no PNG: pixels of a JPEG are not
        exactly those that were drawn."""
        try:
            with Image.open(self.path) as opened:
                if opened.format != "PNG":
                    raise UserError(f"{self.path}: a mask has to be a PNG, not {opened.format}")
                # The numbers of instances in 16 bits, 1, 2 …, would all be black as an image of 8 bits.
                if opened.mode.startswith("I"):
                    return np.asarray(opened) > 0
                return np.asarray(as_pil(opened)).any(axis=2)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path}: not a readable mask") from error


def seen_mask(mask: Bool[np.ndarray, "height width"], visual: nn.Module) -> Bool[np.ndarray, "rows columns"]:
    """The part of a mask that ``visual`` sees (:func:`~clipmapper.data.images.seen_part`), at the mask's own
    resolution. What is padded decides nothing."""
    grey: UInt8[np.ndarray, "height width 3"] = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    return seen_part(Image.fromarray(grey), visual, fill=0).any(axis=2)


def resized(
    mask: Bool[np.ndarray, "height width"], size: tuple[int, int]
) -> Bool[np.ndarray, "rows columns"]:
    """A mask in ``size`` rows and columns of pixels, each as the nearest pixel of the mask is."""
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


OTHER = "other"  # the family of a question whose data set has no answer types


@runtime_checkable
class StoredImage(Protocol):
    """An image that is fetched when it is needed, such as a row of a Hugging Face data set."""

    def read(self) -> bytes | Image.Image:
        """The encoded file, or the image."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question about an image, or one image with its captions.

    Attributes
    ----------
    id : the data set's own question (image) id, an int where the official results file wants one.
    image : path, the bytes of an image file, or a :class:`StoredImage`.
    image_id : the same for all records of an image; splits are made by it.
    question, answers, family : for visual question answering. ``answers`` are those that people gave, one an
        annotator: annotators are told apart by place, so data whose answers have no id (VizWiz) count right.
        None of them for a test split. ``family`` is the answer type (VQA v2) or whatever accuracies are
        reported by.
    captions : for captioning, what people wrote.
    source : file and line, for messages.
    truth : what decides the answer, where the data set knows it.
    """

    id: int | str
    image: Path | bytes | StoredImage
    image_id: str
    question: str | None = None
    answers: tuple[str, ...] = ()
    family: str = OTHER
    captions: tuple[str, ...] = ()
    source: str = ""
    truth: Truth | None = None

    def pil(self) -> Image.Image:
        """The image in RGB, turned upright by its EXIF orientation. Raises ``UserError`` with the source."""
        try:
            # (Whether something has the methods of a protocol takes half a millisecond to find out.)
            if not isinstance(self.image, Path | bytes) and isinstance(self.image, StoredImage):
                return as_pil(self.image.read())
            return as_pil(self.image)
        except UserError as error:
            raise UserError(f"{self.source}: {error}" if self.source else str(error)) from error


_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """``source``: file and line. ``kind``: what problems are counted by. ``detail``: what is behind it."""

    source: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        said = f"{self.kind}: {self.detail}" if self.detail else self.kind
        return f"{self.source}: {said}"


def stop_for(problems: Sequence[Problem]) -> None:
    """Raise ``UserErrors`` with the first 20 problems, a line each, and how many of each kind come after."""
    if not problems:
        return
    lines = [str(problem) for problem in problems[:_SHOWN]]
    rest = Counter(problem.kind for problem in problems[_SHOWN:])
    if rest:
        counts = ", ".join(f"{count} x {kind}" for kind, count in rest.most_common())
        lines.append(f"and {rest.total()} more: {counts}")
    raise UserErrors(lines)
