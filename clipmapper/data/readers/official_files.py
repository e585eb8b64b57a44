"""Readings that the files of several public data sets have in common."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from clipmapper.data.readers.fields import NUMBER, TEXT, Entries
from clipmapper.host.progress import counted

_IMAGE = {"id": NUMBER, "file_name": TEXT, "domain": TEXT.or_else(None)}
_CAPTION = {"image_id": NUMBER, "caption": TEXT}


@lru_cache(maxsize=1 << 12)  # several questions in succession are about one image
def coco_image(folder: Path, subset: str, image: int) -> Path:
    """``train2014/COCO_train2014_000000000009.jpg``; of 2017 without the prefix."""
    prefix = "" if subset.endswith("2017") else f"COCO_{subset}_"
    return folder / subset / f"{prefix}{image:012d}.jpg"


def leads_out(name: str) -> bool:
    """Whether an image of this name, as an official file has it, lies outside the folder of images."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def check_image(question: Mapping, said: int | None, reading: Entries) -> None:
    """Take note of a question whose annotation is about another image: their files do not belong together."""
    if said is not None and said != question["image_id"]:
        what = f"{question['image_id']}, in the annotation {said}"
        reading.wrong(question["source"], "another image than its annotation's", what)


def captioned_images(path: Path, what: str, reading: Entries) -> list[tuple[Mapping, list[str]]]:
    """Read a file such as COCO's: each image's entry with its captions, in the order of the images.

    ``reading`` takes note of entries that are wrong, of images that are there twice, and of captions of an
    image that is not there. Raises ``UserError`` where the file is none of that kind.
    """
    images: dict[int, Mapping] = {}
    for image in counted(reading.of_file(path, "images", what, _IMAGE), f"reading {path}, images"):
        if leads_out(image["file_name"]):
            reading.wrong(image["source"], "'file_name' leads out of the images' folder", image["file_name"])
        if images.setdefault(image["id"], image) is not image:
            first = images[image["id"]]["source"].rpartition(": ")[2]
            reading.wrong(image["source"], "the same image twice", f"{image['id']} is that of {first} too")
    complete = not reading.problems  # else captions of images that are there would be told too
    captions: dict[int, list[str]] = {image: [] for image in images}
    told = reading.of_file(path, "annotations", what, _CAPTION)
    for entry in counted(told, f"reading {path}, captions"):
        image = entry["image_id"]
        if image in captions:
            captions[image].append(" ".join(entry["caption"].split()))
        elif complete:
            reading.wrong(entry["source"], "a caption of an image that is not in 'images'", str(image))
    return [(images[image], said) for image, said in captions.items()]
