"""Opening images that users give."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clipmapper.errors import UserError


def as_pil(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation.

    Raises ``UserError`` for a file that is not there or is not an image.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"image: an array must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}"
            )
        return Image.fromarray(image)
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise UserError(f"image={image}: no such file")
        try:
            with Image.open(path) as opened:
                return _upright_rgb(opened)
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise UserError(f"image={image}: not a readable image ({error})") from error
    return _upright_rgb(image)


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow cuts 16-bit grey off at 255 where it should scale it.
        grey = np.asarray(upright).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
