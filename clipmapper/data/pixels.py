"""A record's photograph as the pixels that an image tower reads, by the fast way or by open_clip's own."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from jaxtyping import Float, Num, UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import ToTensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from clipmapper.data.images import mean_and_std
from clipmapper.data.record import Record, StoredImage

DECODING = ("fast", "exact")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class PixelReader:
    """Reads records' images: decoded, resized and cropped as ``open_clip``'s transform of a tower does it.

    Parameters
    ----------
    preprocess : ``visual.preprocess_cfg`` of the image tower.
    decoding : "exact": Pillow, by the very steps of open_clip's transform. "fast": ordinary JPEGs are decoded
        by libjpeg-turbo (to Pillow's bits) and resized by torchvision, which gives the same to a level of 255
        here and there (at most 2 on photographs) in less than half the time; everything else goes the exact
        way: other formats, grey and CMYK JPEGs, those that EXIF turns or that do not end as they should, and
        towers that pad images or that want a rectangle cut out.

    An item is not normalised (:func:`normalised` is for batches on the device, a quarter of the bytes on
    their way there). Raises ``UserError`` for an image that can't be read, with its source.
    """

    def __init__(self, preprocess: Mapping, decoding: str = "fast") -> None:
        settings = PreprocessCfg(**preprocess)
        size = settings.size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        steps = image_transform_v2(settings, is_train=False).transforms
        self._pillow = steps[: next(i for i, step in enumerate(steps) if isinstance(step, ToTensor))]
        squash = settings.resize_mode == "squash"
        square = self.height == self.width and settings.resize_mode == "shortest"
        self.fast = decoding == "fast" and (squash or square)
        self._size = [self.height, self.width] if squash else [self.height]
        self._interpolation = InterpolationMode(settings.interpolation)

    def __call__(self, record: Record) -> UInt8[Tensor, "3 height width"]:
        if self.fast:
            decoded = _decoded(record)
            if decoded is not None:
                return self._fitted(decoded)
        return self.exact(record.pil())

    def many(self, records: Sequence[Record]) -> UInt8[Tensor, "records 3 height width"]:
        """The images of several records."""
        return torch.stack([self(record) for record in records])

    def exact(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """Transform an upright RGB image by Pillow."""
        for step in self._pillow:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _fitted(self, pixels: UInt8[Tensor, "3 rows columns"]) -> UInt8[Tensor, "3 height width"]:
        fitted = resize(pixels, self._size, self._interpolation, antialias=True)
        return center_crop(fitted, [self.height, self.width])


def normalised(
    pixels: Num[Tensor, "batch 3 height width"], visual: nn.Module
) -> Float[Tensor, "batch 3 height width"]:
    """The input of ``visual`` (an ``open_clip`` image tower), as its transform computes it: from uint8, or as
    it is where it is normalised already."""
    if pixels.is_floating_point():
        return pixels
    mean, std = mean_and_std(visual, pixels.device)
    return (pixels.float() / 255).sub_(mean).div_(std)


def _decoded(record: Record) -> UInt8[Tensor, "3 rows columns"] | None:
    """The image of an ordinary JPEG; None for what is to go the exact way, which also says what is wrong."""
    try:
        image = record.image
        data = image.read_bytes() if isinstance(image, Path) else image
        # (Asked last, for to ask whether something has the methods of a protocol takes half a millisecond.)
        if not isinstance(data, bytes) and isinstance(data, StoredImage):
            data = data.read()
        if not isinstance(data, bytes) or not _ordinary(data):
            return None
        # Not the faster transform and upsampling: those change pixels by some levels.
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception:  # whatever it is, the exact way says it
        return None


def _ordinary(data: bytes) -> bool:
    """A whole JPEG of three colours that is upright. (One that was cut off does not end as it should.)"""
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return False
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours != "YCbCr" or height * width > Image.MAX_IMAGE_PIXELS:
        return False
    if b"Exif" not in data:
        return True
    with Image.open(BytesIO(data)) as header:
        return header.format == "JPEG" and header.getexif().get(_ORIENTATION, 1) == 1
