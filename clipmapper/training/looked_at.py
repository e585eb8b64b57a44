"""The images of records that are explained, for a reader and for the encoder."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from clipmapper.data.images import seen_part
from clipmapper.data.pixels import normalised
from clipmapper.data.record import Record, seen_mask
from clipmapper.errors import UserError

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


def whole_picture(record: Record) -> UInt8[np.ndarray, "height width 3"]:
    """An image to be looked at, whole and upright."""
    found = record.pil()
    found.thumbnail((LARGEST, LARGEST))
    return np.asarray(found)


def mask_of(record: Record, visual: nn.Module) -> Bool[np.ndarray, "rows columns"] | None:
    """The pixels that decide, as the image tower sees them and in its pixels; None where they are not known.

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
    side = visual.image_size
    return seen_mask(mask, side if isinstance(side, tuple) else (side, side), visual)
