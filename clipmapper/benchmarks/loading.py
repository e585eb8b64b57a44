"""Speed of reading photographs: decoding and resizing on one core, and loaders with workers."""

import importlib.util
import io
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from clipmapper.benchmarks.timing import machine, measured
from clipmapper.data.clip_transform import ClipTransform
from clipmapper.data.images import as_pil
from clipmapper.data.records import Record, RecordDataset
from clipmapper.errors import UserError


def loading_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; without it, drawn ones of 640 x 480")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="of what the encoder reads")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)


def loading(options: Namespace) -> dict:
    """Images/s by each way to decode and resize on one core, and by loaders with workers.

    ``deviation``: from open_clip's own transform, in levels of 255. ``pillow_torchvision`` is
    :class:`ClipTransform`.
    """
    files = _files(options)
    ways = _ways(options.size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = {name: _chained(decode, fit) for name, (decode, fit) in ways.items()}
        decoding = {f"{name}_decode_only": ways[name][0] for name in ("pillow", "simplejpeg") if name in ways}
        todo = whole | decoding
        times = measured({name: _over(way, files) for name, way in todo.items()}, options.repeats)
        reference = [whole["pillow"](file) for file in files[:16]]
        deviation = {
            name: max(
                float((way(file).float() - wanted.float()).abs().mean())
                for file, wanted in zip(files, reference, strict=False)
            )
            for name, way in whole.items()
        }
    finally:
        torch.set_num_threads(threads)
    speed = {name: len(files) / its["median_s"] for name, its in times.items()}
    loaders = measured(
        {str(workers): _loader(files, options.size, workers) for workers in options.workers}, options.repeats
    )
    return {
        "machine": machine(torch.device("cpu")),
        "settings": {**vars(options), "images": options.images and str(options.images)},
        "megapixels": float(np.mean([np.prod(Image.open(io.BytesIO(f)).size) for f in files])) / 1e6,
        "times": times,
        "images_per_s_and_core": speed,
        "deviation": deviation,
        "speed_up": speed["pillow_torchvision"] / speed["pillow"],
        "loader_images_per_s": {name: len(files) / its["median_s"] for name, its in loaders.items()},
    }


Decode = Callable[[bytes], object]
Way = Callable[[bytes], Tensor]


def _ways(size: int) -> dict[str, tuple[Decode, Callable]]:
    """Name → (how to decode, how to resize and crop)."""
    by_pillow = image_transform_v2(_settings(size), is_train=False).transforms[:2]
    transform = ClipTransform(vars(_settings(size)))

    def pillow(image: Image.Image) -> Tensor:
        for step in by_pillow:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def draft(file: bytes) -> Image.Image:
        """Decoded at a half, a quarter or an eighth, as far as that is not smaller than what is wanted."""
        image = Image.open(io.BytesIO(file))
        image.draft("RGB", (size, size))
        return image.convert("RGB")

    def torchvision(pixels: Tensor) -> Tensor:
        fitted = resize(pixels, [size], InterpolationMode.BICUBIC, antialias=True)
        return center_crop(fitted, [size, size])

    ways: dict[str, tuple[Decode, Callable]] = {
        "pillow": (as_pil, pillow),
        "pillow_draft": (draft, pillow),
        "pillow_torchvision": (as_pil, transform.pixels),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        ways["simplejpeg"] = (
            lambda file: torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1),
            torchvision,
        )
    return ways


def _settings(size: int) -> PreprocessCfg:
    return PreprocessCfg(size=size)


def _chained(decode: Decode, fit: Callable) -> Way:
    return lambda file: fit(decode(file))


def _over(way: Callable, files: list[bytes]) -> Callable[[], None]:
    def work() -> None:
        for file in files:
            way(file)

    return work


def _loader(files: list[bytes], size: int, workers: int) -> Callable[[], None]:
    """A pass over the data set as training makes one; starting the workers is not counted."""
    records = [Record(number, file, str(number)) for number, file in enumerate(files)]
    dataset = RecordDataset(records, ClipTransform(vars(_settings(size))))
    loader = DataLoader(
        dataset, batch_size=16, num_workers=workers, persistent_workers=workers > 0, collate_fn=_pixels
    )

    def work() -> None:
        for _ in loader:
            pass

    return work


def _pixels(items: list) -> Tensor:
    return torch.stack([pixels for _, pixels in items])


def _files(options: Namespace) -> list[bytes]:
    if options.images is None:
        return [_drawn(options.seed + number) for number in range(options.count)]
    found = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise UserError(f"--images={options.images}: no JPEG there")
    return [found[number % len(found)].read_bytes() for number in range(options.count)]


def _drawn(seed: int) -> bytes:
    """A JPEG of the size and about the weight of COCO's: smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.float32)
    grained = smooth + rng.normal(0, 8, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
