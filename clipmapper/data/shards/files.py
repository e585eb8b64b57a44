"""Writing WebDataset shards: tar files of images, each followed by what was asked or said about it."""

import contextlib
import io
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from clipmapper.data.answers import ACCURACIES
from clipmapper.data.content import content_digest
from clipmapper.data.records import Record, RecordData, StoredImage
from clipmapper.data.shards.index import INDEX, PLAN, VERSION, Shard, webdataset
from clipmapper.data.shards.samples import KEPT
from clipmapper.errors import UserError
from clipmapper.host.outputs import whole_file, write_whole

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LOCKS = ".writing"
_POLL = 0.2  # seconds between two looks at the shards that other processes are writing


def write_shards(
    data: RecordData,
    folder: Path,
    *,
    images_per_shard: int,
    seed: int,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, list[Shard]]:
    """Write every split of ``data`` to ``folder``, images in a random order, and last an index of it all.

    An image is stored once, as the file that it was (``000000017.jpg``), with all its records behind it
    (``000000017.json``). A shard gets its name when it is complete; the same call after an interruption goes
    on with the shard that was not. Several processes that make the same call share the shards between them:
    each takes one that nobody else is writing, and all wait for the last. ``progress`` is told of images.

    Raises ``UserError`` when the folder holds shards of other data or with other settings, where nothing can
    be written, and for an image that cannot be read.
    """
    plan = {split: _shuffled(records, seed) for split, records in data.splits.items()}
    check_writable(folder)
    with FileLock(folder / _LOCKS / "plan.lock"):
        _check_plan(folder, plan, images_per_shard, seed)
    written: dict[str, list[Shard]] = {}
    parts: dict[str, tuple[Sequence[Sequence[Record]], int]] = {}
    for split, images in plan.items():
        written[split] = []
        for number, start in enumerate(range(0, len(images), images_per_shard)):
            part = images[start : start + images_per_shard]
            shard = Shard(f"{split}-{number:06d}.tar", len(part), sum(map(len, part)))
            written[split].append(shard)
            parts[shard.name] = (part, start)
    _write_all(folder, parts, progress)
    index = {
        "version": VERSION,
        "splits": {split: [vars(shard) for shard in shards] for split, shards in written.items()},
        "answers": None if data.vocabulary is None else list(data.answers),
        "rule": None if data.vocabulary is None else data.vocabulary.rule,
        "accuracy": next(name for name, score in ACCURACIES.items() if score is data.accuracy),
        "families": list(data.families),
        # Each word once, in place of all captions: a captioner's vocabulary needs no more.
        "words": sorted({word for caption in data.wordings() for word in caption.split()}),
    }
    _write_json(folder / INDEX, index)
    return written


def _write_all(folder: Path, parts: dict, progress: Callable[[int], None]) -> None:
    """Every shard that is not there, but for those that another process is writing: these are waited for."""
    while parts:
        others = False
        for name, (part, start) in list(parts.items()):
            lock = FileLock(folder / _LOCKS / f"{name}.lock")
            if not (folder / name).exists():
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    others = True
                    continue
                try:
                    if not (folder / name).exists():  # written by another since it was looked for
                        for left in folder.glob(f"*{name.removesuffix('.tar')}.*.tmp"):
                            left.unlink(missing_ok=True)  # of one that was killed: nobody else has the lock
                        _write_shard(folder / name, part, start)
                finally:
                    lock.release()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            del parts[name]
            progress(len(part))
        if others:
            time.sleep(_POLL)


def check_writable(folder: Path) -> None:
    """Raises ``UserError`` where shards could not be written, before data are read for them."""
    try:
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        trial = folder / _LOCKS / f"trial-{os.getpid()}"
        trial.write_bytes(b"\0")
        trial.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def as_sample(key: str, records: Sequence[Record]) -> dict:
    """Make the sample that ``webdataset`` writes for one image and its records."""
    content, suffix = _encoded(records[0])
    kept = [{name: getattr(r, name) for name in KEPT} for r in records]
    return {"__key__": key, suffix: content, "json": json.dumps(kept).encode()}


def _shuffled(records: Sequence[Record], seed: int) -> list[list[Record]]:
    """Records by image, the images in a random order: what is read in a row should not be alike."""
    ordered = sorted(records, key=lambda record: record.image_id)  # stable: an image's records keep theirs
    images = [list(group) for _, group in groupby(ordered, key=lambda record: record.image_id)]
    random.Random(f"shards/{seed}").shuffle(images)
    return images


def _check_plan(folder: Path, plan: dict, images_per_shard: int, seed: int) -> None:
    keys = [[(r.id, r.image_id, r.question, r.answers, r.captions) for i in images for r in i]
            for images in plan.values()]  # fmt: skip
    now = {
        "images_per_shard": images_per_shard,
        "seed": seed,
        "images": {split: len(images) for split, images in plan.items()},
        "records": content_digest(json.dumps(keys).encode()),
    }
    file = folder / PLAN
    if not file.exists():
        if any(folder.glob("*.tar")):
            raise UserError(f"{folder}: holds tar files already; give a folder of its own")
        _write_json(file, now)
    elif _plan(file) != now:
        raise UserError(
            f"{folder}: holds shards of other data, or made with other settings; give another folder"
        )


def _plan(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged; give another folder") from error


def _write_shard(path: Path, images: Sequence[Sequence[Record]], first: int) -> None:
    writer = webdataset().TarWriter
    try:
        with whole_file(path) as file, writer(file, encoder=False, mtime=0) as tar:
            for number, records in enumerate(images, first):
                tar.write(as_sample(f"{number:09d}", records))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the same command goes on from here"
        ) from error


def _encoded(record: Record) -> tuple[bytes, str]:
    """The file as it is where loaders know its format, otherwise a PNG of its pixels."""
    image = record.image.read() if isinstance(record.image, StoredImage) else record.image
    if isinstance(image, Path):
        image = _read(image, record.source)
    record.pil()  # raises for what is not a readable image
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            suffix = _SUFFIXES.get(opened.format or "")
        if suffix:
            return image, suffix
    png = io.BytesIO()
    record.pil().save(png, "PNG")
    return png.getvalue(), "png"


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: image={path}: {error.strerror}") from error


def _write_json(path: Path, content: dict) -> None:
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n", durable=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
