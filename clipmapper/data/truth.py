"""The truth about what decides an answer, or what a caption speaks of, for data sets that know it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import nn

from clipmapper.data.images import as_pil, seen_part


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
        found = np.asarray(as_pil(self.path)).any(axis=2)
        with Image.open(self.path) as opened:
            # The numbers of instances in 16 bits, 1, 2 …, would all be black as an image of 8 bits.
            return np.asarray(opened) > 0 if opened.mode.startswith("I") else found


def seen_mask(
    mask: Bool[np.ndarray, "height width"], size: tuple[int, int], visual: nn.Module
) -> Bool[np.ndarray, "rows columns"]:
    """The part of a mask that ``visual`` sees (:func:`~clipmapper.data.images.seen_part`), in ``size`` rows
    and columns of pixels; the nearest pixel of the mask says for each. What is padded decides nothing."""
    grey: UInt8[np.ndarray, "height width 3"] = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    return resized(seen_part(Image.fromarray(grey), visual, fill=0).any(axis=2), size)


def resized(
    mask: Bool[np.ndarray, "height width"], size: tuple[int, int]
) -> Bool[np.ndarray, "rows columns"]:
    """A mask in ``size`` rows and columns of pixels, each as the nearest pixel of the mask is."""
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
