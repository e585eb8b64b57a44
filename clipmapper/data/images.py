"""Opening images that users give, and bringing rendered ones to what a CLIP reads."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

from clipmapper.errors import UserError

# What Pillow raises for a file that is damaged or no image.
READING_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def as_pil(image: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation. ``bytes`` are those of an image file.

    Raises ``UserError`` for a file that is not there or is not an image.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"image: an array must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}"
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _upright_rgb(image)
    name = f"image={image}" if isinstance(image, str | Path) else f"image of {len(image)} bytes"
    if isinstance(image, str | Path) and not Path(image).is_file():
        raise UserError(f"{name}: no such file")
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _upright_rgb(opened)
    except READING_ERRORS as error:
        reason = str(error).partition(" <_io")[0]  # Pillow names the object that it read from
        raise UserError(f"{name}: not a readable image ({reason})") from error


def clip_input(
    images: UInt8[np.ndarray, "n side side 3"], visual: nn.Module
) -> Float[Tensor, "n 3 height width"]:
    """Square images as the transform of ``visual`` (an ``open_clip`` image tower) leaves them, all at once.

    Resized with antialiasing where the size differs; the transform's own route over Pillow is several times
    slower and gives the same to a level of 255 or so.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    side = visual.image_size
    size = list(side) if isinstance(side, tuple) else [side, side]
    if list(pixels.shape[2:]) != size:
        interpolation = InterpolationMode(visual.preprocess_cfg["interpolation"])
        pixels = resize(pixels, size, interpolation, antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (visual.image_mean, visual.image_std))
    return (pixels.float() / 255 - mean) / std


def seen_part(image: Image.Image, visual: nn.Module) -> UInt8[np.ndarray, "height width 3"]:
    """What ``visual`` (an ``open_clip`` image tower) sees of an upright image, at the image's own resolution.

    Its transform cuts the middle out of an image that is not square (CLIP), squashes it (SigLIP), or pads it.
    Patches lie on this picture as they lie on the tower's input, whatever the shapes.
    """
    side = visual.image_size
    rows, columns = side if isinstance(side, tuple) else (side, side)
    mode = visual.preprocess_cfg["resize_mode"]
    width, height = image.size
    if mode == "squash":
        return np.asarray(image)
    # As many pixels of the image as the input is high and wide, from the middle; "shortest" keeps the shorter
    # side whole, "longest" the longer one, so that the box is larger than the image.
    scales = (height / rows, width / columns)
    scale = min(scales) if mode == "shortest" else max(scales)
    seen_width, seen_height = round(scale * columns), round(scale * rows)
    left, top = round((width - seen_width) / 2), round((height - seen_height) / 2)
    fill = visual.preprocess_cfg["fill_color"]
    canvas = Image.new(
        "RGB", (seen_width, seen_height), (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    )
    canvas.paste(image, (-left, -top))
    return np.asarray(canvas)


def picture_of(
    image: str | Path | bytes | Image.Image | np.ndarray | Tensor,
    pixels: Float[Tensor, "1 3 height width"],
    visual: nn.Module,
) -> UInt8[np.ndarray, "tall wide 3"]:
    """What is shown of an explained image: :func:`seen_part`, or, of an image that was given
    as a tensor, the ``pixels`` that ``visual`` reads."""
    return displayed_image(pixels, visual) if isinstance(image, Tensor) else seen_part(as_pil(image), visual)


def displayed_image(
    pixels: Float[Tensor, "1 3 height width"], visual: nn.Module
) -> UInt8[np.ndarray, "height width 3"]:
    """Undo the normalisation of ``visual`` (an ``open_clip`` image tower): the image as the model saw it."""
    mean, std = (
        torch.tensor(v, device=pixels.device)[:, None, None] for v in (visual.image_mean, visual.image_std)
    )
    image = (pixels[0] * std + mean).clamp(0, 1) * 255
    return image.round().byte().permute(1, 2, 0).cpu().numpy()


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow cuts 16-bit grey off at 255 where it should scale it.
        grey = np.asarray(upright).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
