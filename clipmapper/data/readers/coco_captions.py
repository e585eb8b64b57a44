"""COCO's captions (Chen et al. 2015, arXiv 1504.00325), and the Karpathy split of them."""

from collections.abc import Iterator
from pathlib import Path

from clipmapper.data.image_checks import readable_only
from clipmapper.data.readers.fields import NUMBER, TEXT, Entries, shown
from clipmapper.data.readers.official_files import captioned_images
from clipmapper.data.records import Record, RecordData
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.tables.remembered import Found, remembered
from clipmapper.data.text_files import check_file, given_path
from clipmapper.errors import UserError

# Karpathy and Fei-Fei 2015 (arXiv 1412.2306) held 10,000 images of val2014 out; the rest is trained on.
_KARPATHY = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
_SPLIT_FILE = "the Karpathy split (dataset_coco.json)"
_SPLIT_ENTRY = {"cocoid": NUMBER, "split": TEXT}


def coco_captions_data(
    folder: str,
    karpathy: str | None = None,
    *,
    on_bad_image: str = "error",
    decoding: str = "fast",
    check: str = "full",
    workers: int = 0,
) -> RecordData:
    """``folder`` holds ``annotations/captions_train2014.json``, ``captions_val2014.json`` and the images,
    ``train2014/`` and ``val2014/`` (or all of 2017).

    ``karpathy``: the file ``dataset_coco.json``, relative to ``folder``; None: COCO's own train and val.
    The others: as of :func:`clipmapper.data.readers.manifest.manifest_data`.

    Raises ``UserError`` for missing files, and ``UserErrors`` with every entry that is wrong, images without
    a caption and captions without an image among them. What was converted is counted in the notes.
    """
    root = given_path(folder)
    years = [y for y in ("2014", "2017") if _file(root, f"train{y}").is_file()]
    year = years[0] if years else "2014"

    def read(target: Path | None) -> Found:
        converted: list[str] = []
        if karpathy is not None and _file(root, f"train{year}").is_file():
            check_file(root / karpathy, _SPLIT_FILE)  # before the captions are read, which takes longer
        official = {name: read_coco_captions(root, f"{name}{year}", converted) for name in ("train", "val")}
        if karpathy is None:
            splits = {"train": official["train"], "validation": official["val"]}
        else:
            splits = _karpathy(root / karpathy, {r.id: r for some in official.values() for r in some})
        table = TableBuilder(target)
        for name, records in splits.items():
            table.extend(name, records)
        finished = table.finish()
        return Found(finished.columns, finished.splits(), (), converted)

    files = [_file(root, f"{name}{year}") for name in ("train", "val")]
    files += [] if karpathy is None else [root / karpathy]
    found = remembered("coco_captions", files, {"folder": folder, "karpathy": karpathy}, read)
    readable, notes = readable_only(found.splits, on_bad_image, check=check)
    return RecordData(readable, None, decoding=decoding, workers=workers, notes=[*notes, *found.notes])


def read_coco_captions(folder: Path, subset: str, notes: list[str]) -> Iterator[Record]:
    """Yield the images of ``subset`` with their captions, the first when all of the file is found right.

    They come in the order of the file. ``notes`` is added to.
    """
    file = _file(folder, subset)
    reading = Entries()
    images = captioned_images(file, f"COCO's captions of {subset}", reading)
    complete = not reading.problems  # else the captions that are wrong would be told twice
    for image, said in images if complete else ():
        if not said:
            reading.wrong(str(file), "an image without a caption", str(image["id"]))
    reading.stop()
    if not images:
        raise UserError(f"{file}: no images in it")
    notes += reading.notes(file.name)
    for image, said in images:
        path = folder / subset / image["file_name"]
        yield Record(
            id=image["id"],
            image=path,
            image_id=str(path),
            captions=tuple(said),
            source=f"{file.name}: image {image['id']}",
        )


def _karpathy(file: Path, records: dict) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    reading, seen = Entries(), set()
    for entry in reading.of_file(file, "images", _SPLIT_FILE, _SPLIT_ENTRY):
        source, image, split = entry["source"], entry["cocoid"], entry["split"]
        if split not in _KARPATHY:
            reading.wrong(source, f"'split' is not one of {', '.join(_KARPATHY)}", shown(split))
        elif image not in records:
            reading.wrong(source, "an image that is not in COCO's annotations", str(image))
        elif image in seen:
            reading.wrong(source, "the same image twice", str(image))
        else:
            seen.add(image)
            splits[_KARPATHY[split]].append(records[image])
    reading.stop()
    empty = [name for name in ("train", "validation") if not splits[name]]
    if empty:
        raise UserError(f"{file}: no image for {empty[0]}")
    return {name: some for name, some in splits.items() if some}


def _file(folder: Path, subset: str) -> Path:
    return folder / "annotations" / f"captions_{subset}.json"
