"""The faster transform against open_clip's own."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipmapper.data.clip_transform import ClipTransform

SETTINGS = {
    "clip": {"size": 32},
    "siglip": {"size": 32, "resize_mode": "squash", "interpolation": "bicubic", "mean": (0.5,) * 3},
    "bilinear": {"size": (32, 32), "interpolation": "bilinear"},
    "padded": {"size": 32, "resize_mode": "longest"},
    "rectangle": {"size": (32, 24)},
    "flat": {"size": (24, 32), "resize_mode": "squash"},
}


@pytest.mark.parametrize("shape", [(60, 101), (101, 60), (20, 20), (33, 32)])
@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_those_of_open_clip_to_a_level(name, shape):
    settings = PreprocessCfg(**SETTINGS[name])
    small = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC)
    found = ClipTransform(vars(settings))(image)
    wanted = image_transform_v2(settings, is_train=False)(image)
    assert found.shape == wanted.shape
    levels = (found - wanted).abs() * torch.tensor(settings.std)[:, None, None] * 255
    assert float(levels.max()) < 1.01 and float(levels.mean()) < 0.2
