"""Opening images that users give."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
            opened = Image.open(path)
            opened.load()
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            raise UserError(f"image={image}: not a readable image ({error})") from error
        image = opened
    return ImageOps.exif_transpose(image).convert("RGB")
