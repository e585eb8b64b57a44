"""Logged things besides numbers, in words of no logger: pictures, text with colours, and tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A picture in a file of the run, or its pixels."""

    source: Path | UInt8[np.ndarray, "height width 3"]

    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels, whichever way they were given."""
        if not isinstance(self.source, Path):
            return np.asarray(self.source)
        with Image.open(self.source) as image:
            return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Html:
    """A piece of a page."""

    code: str


Cell = Picture | Html | str | int | float | bool | None


@dataclass(frozen=True)
class MediaTable:
    """Rows with a cell for every column; there may be none."""

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]


Media = Mapping[str, Picture | MediaTable]  # by the name that a logger shows


def pictures_in(media: Media) -> Iterator[tuple[str, Picture]]:
    """All pictures; those of a table are called ``table/row/column``."""
    for name, shown in media.items():
        if isinstance(shown, Picture):
            yield name, shown
            continue
        for number, row in enumerate(shown.rows):
            for column in shown.columns:
                if isinstance(row[column], Picture):
                    yield f"{name}/{number:02d}/{column}", row[column]
