"""Speed of reading photographs: one core, and loaders with workers, by the loaders' own reader."""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from clipmapper.benchmarks.timing import machine, measured
from clipmapper.commands.mistakes import seed, some_path, whole
from clipmapper.data.images import image_problem
from clipmapper.data.pixels import DECODING, PixelReader
from clipmapper.data.records import Record, RecordDataset
from clipmapper.errors import UserError


def loading_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=some_path, help="a folder of JPEGs; without it, some are drawn")
    parser.add_argument("--count", type=whole(), default=64)
    parser.add_argument("--size", type=whole(), default=224, help="of what the encoder reads")
    parser.add_argument("--workers", type=whole(0), nargs="*", default=[0, 2])
    parser.add_argument("--seed", type=seed, default=0)


def loading(options: Namespace) -> dict:
    """Images/s of open_clip's transform and of the loaders' reader, each on one core; loaders with workers.

    "fast" and "exact" are :class:`PixelReader`, what every loader of records calls. ``deviation``: of their
    pixels from open_clip's own, in levels of 255, mean and largest. ``bytes``: of an image on its way to the
    device.
    """
    records = [Record(number, file, str(number)) for number, file in enumerate(_files(options))]
    settings = PreprocessCfg(size=options.size)
    transform = image_transform_v2(settings, is_train=False)
    readers = {decoding: PixelReader(vars(settings), decoding) for decoding in DECODING}
    ways: dict[str, Callable[[Record], Tensor]] = {
        "open_clip": lambda record: transform(record.pil()),
        **readers,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = measured({name: _over(way, records) for name, way in ways.items()}, options.repeats)
        std, mean = (torch.tensor(v)[:, None, None] for v in (settings.std, settings.mean))
        levels = [(ways["open_clip"](record) * std + mean) * 255 for record in records]
        deviation = {}
        for name, reader in readers.items():
            pairs = zip(map(reader, records), levels, strict=True)
            off = torch.stack([(pixels.float() - wanted).abs() for pixels, wanted in pairs])
            deviation[name] = {"mean": round(float(off.mean()), 4), "max": round(float(off.max()), 2)}
    finally:
        torch.set_num_threads(threads)
    # (Of this process's one thread: on a machine that others use too, its own seconds are what compares.)
    speed = {name: len(records) / its["cpu_median_s"] for name, its in times.items()}
    loaders = measured(
        {str(workers): _loader(records, readers["fast"], workers) for workers in options.workers},
        options.repeats,
    )
    return {
        "machine": machine(torch.device("cpu")),
        "settings": {**vars(options), "images": options.images and str(options.images)},
        "megapixels": float(np.mean([np.prod(Image.open(io.BytesIO(r.image)).size) for r in records])) / 1e6,
        "times": times,
        "images_per_s_and_core": speed,
        "bytes": {name: way(records[0]).nbytes for name, way in ways.items()},
        "deviation": deviation,
        "speed_up": speed["fast"] / speed["open_clip"],
        "loader_images_per_s": {name: len(records) / its["median_s"] for name, its in loaders.items()},
    }


def _over(way: Callable[[Record], Tensor], records: Sequence[Record]) -> Callable[[], None]:
    def work() -> None:
        for record in records:
            way(record)

    return work


def _loader(records: Sequence[Record], reader: PixelReader, workers: int) -> Callable[[], None]:
    """A pass over the data set as training makes one; starting the workers is not counted."""
    loader = DataLoader(
        RecordDataset(records, reader),
        batch_size=16,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_pixels,
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
    found = found[: options.count]
    for file in found:
        if problem := image_problem(file):
            raise UserError(f"--images: {file}: {': '.join(problem)}")
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
