"""Opening images that users give, and bringing rendered ones to what a CLIP reads."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

from clipmapper.data.text_files import other_kind
from clipmapper.errors import UserError

JPEG = b"\xff\xd8\xff"
# JFIF's and Adobe's, which say how colours are stored. Of the others (EXIF, profiles, previews) none is of
# the pixels.
_JPEG_PIXELS = (0xE0, 0xEE)
_COMMENT, _SCAN = 0xFE, 0xDA


def bare_jpeg(content: bytes) -> bytes:
    """The same image without metadata. A file that was cut stays cut."""
    kept, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker = content[place + 1]
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == _SCAN or marker == 0xFF:
            break
        if not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or marker in _JPEG_PIXELS:
            kept.append(content[place:end])
        place = end
    return b"".join([*kept, content[place:]])


PNG = b"\x89PNG\r\n\x1a\n"
# What the pixels need; all else (text, EXIF, colour profiles, times) is metadata.
_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def bare_png(content: bytes) -> bytes:
    """The same image without metadata. A file that was cut stays cut."""
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 12 + length  # with the checksum
        if content[place + 4 : place + 8] in _OF_PIXELS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


_SLIMMEST = 1000  # a longer side more than this many times the shorter one would grow beyond any memory


_BARE = {PNG: bare_png, JPEG: bare_jpeg}


def ignore_bad_metadata() -> None:
    """Suppress Pillow's warnings about EXIF and the like that it can't read; for this process and good.

    (Only a filter can do it: images are read by threads, for which ``catch_warnings`` is not made.)
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Jpeg|Png)ImagePlugin$")


ignore_bad_metadata()


class UnreadableImage(Exception):
    """(kind of problem, reason)"""


def as_pil(image: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """An RGB image, turned upright by its EXIF orientation. ``bytes`` are those of an image file.

    Metadata that can't be read is ignored. Raises ``UserError`` for a file that is not there or is not an
    image.
    """
    try:
        return _decoded(image)
    except UnreadableImage as error:
        if isinstance(image, str | Path):
            name = f"image={str(image)[:200]}"
        else:
            name = f"image of {len(image)} bytes" if isinstance(image, bytes) else "image"
        kind, reason = error.args
        raise UserError(f"{name}: {reason if kind == NO_FILE else f'{kind} ({reason})'}") from error


NO_FILE = "no such image"
_NOT_READABLE = "not a readable image"


def image_problem(image: Path | bytes | Image.Image) -> tuple[str, str] | None:
    """(kind, reason) where :func:`as_pil` would raise, else None.

    It is the same reading but for a JPEG's size: an eighth of each side. All of its coefficients are decoded
    in either way, which is where a damaged file is found.
    """
    try:
        _decoded(image, reduced=True)
    except UnreadableImage as error:
        return error.args
    return None


def _decoded(image: str | Path | bytes | Image.Image | np.ndarray, *, reduced: bool = False) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(
                f"image: an array must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}"
            )
        return Image.fromarray(image)
    try:
        if isinstance(image, Image.Image):
            return _upright_rgb(image)
        head = image[:1024] if isinstance(image, bytes) else _head(Path(image))
        if other_kind(head) == "PostScript":  # Pillow would have Ghostscript run it
            raise UnreadableImage(_NOT_READABLE, "PostScript, which is a program")
        try:
            return _from_file(BytesIO(image) if isinstance(image, bytes) else image, reduced)
        except Exception:
            # Pillow gives a PNG up for a text chunk that it can't read.
            bare = next((bare for start, bare in _BARE.items() if head.startswith(start)), None)
            if bare is None:
                raise
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
            return _from_file(BytesIO(bare(content)), reduced)
    except (UnreadableImage, KeyboardInterrupt):
        raise
    # Whatever a plugin of Pillow's raises: RuntimeError (AVIF), MemoryError, struct.error, SyntaxError.
    except Exception as error:
        stored = not isinstance(image, Image.Image)
        reason = (other_kind(head) if stored else None) or ("an empty file" if stored and not head else None)
        # Pillow names the object that it read from.
        said = " ".join(str(error).partition(" <_io")[0].splitlines()[:1]) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            said = "cannot identify image file"
        raise UnreadableImage(_NOT_READABLE, reason or said[:200]) from error


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UnreadableImage(_NOT_READABLE, "a folder")
        if not path.is_file():
            raise UnreadableImage(NO_FILE, "no such file")
        with path.open("rb") as file:
            return file.read(1024)
    except (OSError, ValueError) as error:
        raise UnreadableImage(_NOT_READABLE, getattr(error, "strerror", None) or str(error)) from error


def _from_file(file: BytesIO | str | Path, reduced: bool) -> Image.Image:
    with Image.open(file) as opened:
        if max(opened.size) > _SLIMMEST * min(opened.size):
            raise UnreadableImage(
                _NOT_READABLE, f"{opened.width} x {opened.height} pixels, too slim to be brought to a square"
            )
        if reduced:
            opened.draft("RGB", (1, 1))
        return _upright_rgb(opened)


def input_size(visual: nn.Module) -> tuple[int, int]:
    """(rows, columns) of the pixels that ``visual`` (an ``open_clip`` image tower) reads."""
    side = visual.image_size
    return tuple(side) if isinstance(side, tuple) else (side, side)


def mean_and_std(
    visual: nn.Module, device: torch.device
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """By which the input of ``visual`` is normalised."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (visual.image_mean, visual.image_std))
    return mean, std


def clip_input(
    images: UInt8[np.ndarray, "n side side 3"], visual: nn.Module
) -> Float[Tensor, "n 3 height width"]:
    """Square images as the transform of ``visual`` (an ``open_clip`` image tower) leaves them, all at once.

    Resized with antialiasing where the size differs; the transform's own route over Pillow is several times
    slower and gives the same to a level of 255 or so.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    size = list(input_size(visual))
    if list(pixels.shape[2:]) != size:
        interpolation = InterpolationMode(visual.preprocess_cfg["interpolation"])
        pixels = resize(pixels, size, interpolation, antialias=True)
    mean, std = mean_and_std(visual, pixels.device)
    return (pixels.float() / 255 - mean) / std


def seen_part(
    image: Image.Image, visual: nn.Module, fill: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Cut out what ``visual`` (an ``open_clip`` image tower) sees of an upright image, at its own resolution.

    Its transform cuts the middle out of an image that is not square (CLIP), squashes it (SigLIP), or pads it.
    Patches lie on this picture as they lie on the tower's input, whatever the shapes. ``fill``: the colour of
    what is padded; None: the transform's own.
    """
    rows, columns = input_size(visual)
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
    fill = visual.preprocess_cfg["fill_color"] if fill is None else fill
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
    """Return the picture under an explanation: :func:`seen_part`, or, for an image given as a tensor, the
    ``pixels`` that ``visual`` reads."""
    return displayed_image(pixels, visual) if isinstance(image, Tensor) else seen_part(as_pil(image), visual)


def levels(images: Num[Tensor, "n 3 height width"], visual: nn.Module) -> UInt8[Tensor, "n 3 height width"]:
    """Undo the normalisation of ``visual`` (an ``open_clip`` image tower); uint8 is given back as it is."""
    if not images.is_floating_point():
        return images
    mean, std = mean_and_std(visual, images.device)
    return ((images * std + mean).clamp(0, 1) * 255).round().byte()


def displayed_image(
    pixels: Float[Tensor, "1 3 height width"], visual: nn.Module
) -> UInt8[np.ndarray, "height width 3"]:
    """The image as ``visual`` (an ``open_clip`` image tower) saw it."""
    return levels(pixels, visual)[0].permute(1, 2, 0).cpu().numpy()


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # first: what is wrong with the pixels is no matter of the metadata
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # EXIF that can't be read
        upright = image
    if upright.mode.startswith("I"):
        # Pillow cuts 16-bit grey off at 255 where it should scale it.
        grey = np.asarray(upright).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
