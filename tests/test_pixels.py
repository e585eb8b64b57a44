"""Photographs as the loaders read them, against open_clip's own transform."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from clipmapper.data import pixels as reading
from clipmapper.data.pixels import PixelReader, normalised
from clipmapper.data.records import Record
from clipmapper.errors import UserError

SETTINGS = {
    "clip": {"size": 32},
    "siglip": {"size": 32, "resize_mode": "squash", "interpolation": "bicubic", "mean": (0.5,) * 3},
    "bilinear": {"size": (32, 32), "interpolation": "bilinear"},
    "padded": {"size": 32, "resize_mode": "longest"},
    "rectangle": {"size": (32, 24)},
    "flat": {"size": (24, 32), "resize_mode": "squash"},
}


def drawn(width, height, seed=0):
    """Smooth colours, as a photograph has."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def record(data):
    return Record(1, data, "1", source="m.jsonl:1")


def wanted(data, name):
    cfg = PreprocessCfg(**SETTINGS[name])
    return image_transform_v2(cfg, is_train=False)(record(data).pil())


def read(data, name, decoding):
    cfg = PreprocessCfg(**SETTINGS[name])
    visual = nn.Module()  # of which only these are asked
    visual.image_mean, visual.image_std = cfg.mean, cfg.std
    found = PixelReader(vars(cfg), decoding)(record(data))
    assert found.dtype == torch.uint8
    return normalised(found[None], visual)[0]


def levels(found, expected, name):
    return (found - expected).abs() * torch.tensor(PreprocessCfg(**SETTINGS[name]).std)[:, None, None] * 255


@pytest.mark.parametrize("name", SETTINGS)
def test_the_exact_way_has_the_bits_of_open_clip(name):
    for size in ((101, 60), (60, 101), (20, 20), (1, 7)):
        data = encoded(drawn(*size))
        assert torch.equal(read(data, name, "exact"), wanted(data, name))


@settings(max_examples=25)
@given(
    width=st.integers(32, 120), height=st.integers(32, 120), quality=st.integers(20, 95),
    subsampling=st.sampled_from([0, 1, 2]), progressive=st.booleans(), name=st.sampled_from(list(SETTINGS)),
)  # fmt: skip
def test_the_fast_way_is_off_by_few_levels(width, height, quality, subsampling, progressive, name):
    image = drawn(width, height)
    data = encoded(image, quality=quality, subsampling=subsampling, progressive=progressive)
    off = levels(read(data, name, "fast"), wanted(data, name), name)
    assert float(off.max()) < 3.01 and float(off.mean()) < 0.5


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


PICTURE = drawn(60, 41)
OTHER_WAYS = {
    "PNG": encoded(PICTURE, "PNG"),
    "WebP": encoded(PICTURE, "WEBP"),
    "grey": encoded(PICTURE.convert("L")),
    "CMYK": encoded(PICTURE.convert("CMYK")),
    "turned by EXIF": turned(PICTURE),
    "something behind it": encoded(PICTURE) + b"more",
}


@pytest.mark.parametrize("kind", OTHER_WAYS)
def test_anything_but_an_ordinary_jpeg_goes_the_exact_way(kind):
    data = OTHER_WAYS[kind]
    assert reading._decoded(record(data)) is None and reading._decoded(record(encoded(PICTURE))) is not None
    for name in ("clip", "siglip"):
        assert torch.equal(read(data, name, "fast"), wanted(data, name))


@pytest.mark.parametrize("data", [b"", b"no image", encoded(PICTURE)[:-40], encoded(PICTURE)[:100]])
def test_what_cannot_be_read_says_so_with_its_source(data):
    for decoding in ("fast", "exact"):
        with pytest.raises(UserError, match=r"m\.jsonl:1: .*not a readable image"):
            PixelReader(vars(PreprocessCfg(size=32)), decoding)(record(data))


def test_files_and_missing_ones(tmp_path):
    file = tmp_path / "1.jpg"
    file.write_bytes(encoded(PICTURE))
    reader = PixelReader(vars(PreprocessCfg(size=32)))
    assert torch.equal(reader(record(file)), reader(record(file.read_bytes())))
    with pytest.raises(UserError, match="no such file"):
        reader(record(tmp_path / "2.jpg"))
