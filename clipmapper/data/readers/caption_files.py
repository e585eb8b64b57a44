"""Captions in official files: COCO's (Chen et al. 2015, arXiv 1504.00325) with the Karpathy split, Flickr's.

Flickr30k and Flickr8k have one token file with five captions an image, and lists of images for splits.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from clipmapper.data.image_checks import readable_only
from clipmapper.data.readers.fields import NUMBER, TEXT, Entries, shown
from clipmapper.data.readers.manifest import captioned_images, data_of, leads_out
from clipmapper.data.record import Problem
from clipmapper.data.records import Record, RecordData
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.tables.remembered import Found, remembered
from clipmapper.data.tables.whole import table_of_whole
from clipmapper.data.text_files import check_file, given_path, text_lines
from clipmapper.errors import UserError
from clipmapper.host.progress import counted

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
    augment: str = "none",
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
    notes += found.notes
    return RecordData(readable, None, decoding=decoding, workers=workers, augment=augment, notes=notes)


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


_SPLITS = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}


def flickr_captions_data(
    tokens: str,
    images: str,
    split_files: str | None = None,
    *,
    validation_share: float = 0.05,
    split_seed: int = 0,
    on_bad_image: str = "error",
    decoding: str = "fast",
    check: str = "full",
    workers: int = 0,
    augment: str = "none",
) -> RecordData:
    """Read a token file, ``1000092795.jpg#0<tab>caption`` a line (``results_20130124.token``,
    ``Flickr8k.token.txt``), or the same as a table, whose first line is ``image,caption`` or
    ``image_name| comment_number| comment``.

    ``images``: their folder. ``split_files``: a folder with a list of images for each split, in files whose
    name contains train, val or dev, and test (``train.txt``, ``Flickr_8k.devImages.txt``); images that are
    in none of them are left out. Without it validation images are drawn by image.
    ``validation_share`` and so on: as of :func:`clipmapper.data.readers.manifest.manifest_data`.

    Raises ``UserErrors`` with every line that cannot be read.
    """
    file, folder = given_path(tokens), given_path(images)
    if not folder.is_dir():
        raise UserError(f"data.images={images}: no such folder")

    def read(target: Path | None) -> Found:
        problems: list[Problem] = []
        captions: dict[str, list[str]] = {}
        sources: dict[str, str] = {}
        for source, found in counted(_lines(file), f"reading {file}"):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            name, caption = found
            captions.setdefault(name, []).append(caption)
            sources.setdefault(name, source)
        listed = {} if split_files is None else _listed(given_path(split_files))
        absent = [name for name in listed if name not in captions] if listed else []
        if absent:
            stems = {Path(name).stem for name in captions}
            absent = [name for name in absent if name not in stems]
        table = TableBuilder(target)
        for name, said in captions.items():
            # Lists name an image with or without its ending.
            split = listed.get(name, listed.get(Path(name).stem))
            if listed and split is None:
                continue
            path = folder / name
            table.add(split, Record(name, path, str(path), captions=tuple(said), source=sources[name]))
        notes = [f"{split_files}: {len(absent)} images without captions, such as {n}" for n in absent[:1]]
        return table_of_whole(table.finish(), problems, notes)

    files = [file, *([] if split_files is None else sorted(given_path(split_files).glob("*.txt")))]
    settings = {"images": images, "split_files": split_files}
    return data_of(
        remembered("flickr_captions", files, settings, read),
        where=tokens,
        validation_share=validation_share,
        split_seed=split_seed,
        on_bad_image=on_bad_image,
        decoding=decoding,
        check=check,
        workers=workers,
        augment=augment,
        folder=folder,
    )


def _lines(file: Path) -> Iterator[tuple[str, tuple[str, str] | Problem]]:
    text = list(text_lines(file, "a token file of Flickr's captions (data.tokens)"))
    first = text[0]
    table = "\t" not in first and re.match(r"image(_name)?\s*([,;|])", first)
    for number, line in enumerate(text, 1):
        source = f"{file}:{number}"
        if not line.strip() or (table and number == 1):
            continue
        if table and table[2] == "|":  # Flickr30k's table on Kaggle: one line of it lacks its second mark
            cells = [cell.strip() for cell in line.split("|", 2)]
            name, caption = cells[0], cells[-1] if len(cells) == 3 else ""
        elif table:
            try:
                cells = next(csv.reader([line], delimiter=table[2]))
            except csv.Error as error:
                yield source, Problem(source, "not CSV", str(error))
                continue
            name, caption = (cells[0], table[2].join(cells[1:]).strip()) if len(cells) > 1 else (line, "")
        else:
            name, _, caption = (part.strip() for part in line.partition("\t"))
            name = re.sub(r"#\d+$", "", name)
        if not caption or not name or "\0" in line:
            yield source, Problem(source, "no image and caption", f"{line[:60]!r}")
        elif leads_out(name):
            yield source, Problem(source, "an image outside the folder of images", shown(name))
        else:
            yield source, (name, caption)


def _listed(folder: Path) -> dict[str, str]:
    """Image → split."""
    if not folder.is_dir():
        raise UserError(f"data.split_files={folder}: no such folder")
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt")):
        names = [
            split for word, split in _SPLITS.items() if word in file.name.lower().replace("trainval", "")
        ]
        for number, line in enumerate(text_lines(file) if names else (), 1):
            image = line.strip()
            if image and found.setdefault(image, names[0]) != names[0]:
                raise UserError(f"{file}:{number}: {image!r} is in the list of {found[image]} too")
    if not found:
        raise UserError(f"data.split_files={folder}: no file *train*.txt, *val*.txt or *test*.txt in it")
    return found
