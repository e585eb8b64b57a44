"""COCO's captions (Chen et al. 2015, arXiv 1504.00325), and the Karpathy split of them."""

from pathlib import Path

from clipmapper.data.image_checks import readable_only
from clipmapper.data.official_files import entries, read_json
from clipmapper.data.records import Record, RecordData
from clipmapper.data.remembered import Found, remembered
from clipmapper.data.table_builder import TableBuilder
from clipmapper.errors import UserError

# Karpathy and Fei-Fei 2015 (arXiv 1412.2306) held 10,000 images of val2014 out; the rest is trained on.
_KARPATHY = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def coco_captions_data(
    folder: str,
    karpathy: str | None = None,
    *,
    on_bad_image: str = "error",
    check: str = "full",
    workers: int = 0,
) -> RecordData:
    """``folder`` holds ``annotations/captions_train2014.json``, ``captions_val2014.json`` and the images,
    ``train2014/`` and ``val2014/`` (or all of 2017).

    ``karpathy``: the file ``dataset_coco.json``, relative to ``folder``; None: COCO's own train and val.
    ``on_bad_image``, ``check``, ``workers``: as of :func:`clipmapper.data.manifest.manifest_data`.

    Raises ``UserError`` for missing files, images without a caption and captions without an image.
    """
    root = Path(folder)
    years = [y for y in ("2014", "2017") if _file(root, f"train{y}").is_file()]
    year = years[0] if years else "2014"

    def read(target: Path | None) -> Found:
        official = {name: read_coco_captions(root, f"{name}{year}") for name in ("train", "val")}
        if karpathy is None:
            splits = {"train": official["train"], "validation": official["val"]}
        else:
            splits = _karpathy(root / karpathy, {r.id: r for some in official.values() for r in some})
        table = TableBuilder(target)
        for name, records in splits.items():
            table.extend(name, records)
        finished = table.finish()
        return Found(finished.columns, finished.splits())

    files = [_file(root, f"{name}{year}") for name in ("train", "val")]
    files += [] if karpathy is None else [root / karpathy]
    found = remembered("coco_captions", files, {"folder": folder, "karpathy": karpathy}, read)
    readable, notes = readable_only(found.splits, on_bad_image, check=check)
    return RecordData(readable, None, workers=workers, notes=[*found.notes, *notes])


def read_coco_captions(folder: Path, subset: str) -> list[Record]:
    """The images of ``subset`` with their captions, in the order of the file."""
    file = _file(folder, subset)
    content = read_json(file, f"COCO's captions of {subset}")
    names = {e["id"]: e["file_name"] for e in entries(content, "images", file, ("id", "file_name"))}
    captions: dict[int, list[str]] = {image: [] for image in names}
    for entry in entries(content, "annotations", file, ("image_id", "caption")):
        if entry["image_id"] not in captions:
            raise UserError(f"{file}: a caption of image {entry['image_id']}, which is not in 'images'")
        captions[entry["image_id"]].append(" ".join(entry["caption"].split()))
    silent = [image for image, said in captions.items() if not said]
    if silent:
        raise UserError(f"{file}: image {silent[0]} has no caption ({len(silent)} such images)")
    return [
        Record(
            id=image,
            image=folder / subset / names[image],
            image_id=str(folder / subset / names[image]),
            captions=tuple(said),
            source=f"{file.name}: image {image}",
        )
        for image, said in captions.items()
    ]


def _karpathy(file: Path, records: dict) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    content = read_json(file, "the Karpathy split (dataset_coco.json)")
    for entry in entries(content, "images", file, ("cocoid", "split")):
        if entry["split"] not in _KARPATHY:
            raise UserError(f"{file}: split {entry['split']!r} is not one of {', '.join(_KARPATHY)}")
        if entry["cocoid"] not in records:
            raise UserError(f"{file}: image {entry['cocoid']} is not in COCO's annotations")
        splits[_KARPATHY[entry["split"]]].append(records[entry["cocoid"]])
    empty = [name for name in ("train", "validation") if not splits[name]]
    if empty:
        raise UserError(f"{file}: no image for {empty[0]}")
    return {name: some for name, some in splits.items() if some}


def _file(folder: Path, subset: str) -> Path:
    return folder / "annotations" / f"captions_{subset}.json"
