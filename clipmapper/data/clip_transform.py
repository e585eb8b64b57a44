"""What a CLIP reads of a photograph, faster than over Pillow alone."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize


class ClipTransform:
    """An RGB image as ``open_clip``'s own transform leaves it, decoded by Pillow and resized by torchvision.

    Differs from open_clip's, which resizes with Pillow, by one level of 255 here and there, and takes about
    two thirds of the time (``scripts/benchmark.py data`` measures both). ``preprocess``:
    ``visual.preprocess_cfg`` of an image tower. Images that are to be padded, or to fill a rectangle, go
    through open_clip's transform.
    """

    def __init__(self, preprocess: Mapping) -> None:
        settings = PreprocessCfg(**preprocess)
        size = settings.size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.squash = settings.resize_mode == "squash"
        square = self.height == self.width and settings.resize_mode == "shortest"
        self.other = None if self.squash or square else image_transform_v2(settings, is_train=False)
        self.interpolation = InterpolationMode(settings.interpolation)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (settings.mean, settings.std))

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        return self.other(image) if self.other is not None else self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """Resized and cropped."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        size = [self.height, self.width] if self.squash else [self.height]
        return center_crop(
            resize(pixels, size, self.interpolation, antialias=True), [self.height, self.width]
        )

    def normalise(self, pixels: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        return (pixels.float() / 255 - self.mean) / self.std
