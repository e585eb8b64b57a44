"""Reading the files of public data sets, with messages that say what is missing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipmapper.errors import UserError


def read_json(path: Path, what: str) -> Mapping | Sequence:
    """The content of an official file. Raises ``UserError`` that says ``what`` the file should have been."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {what} belongs there")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error


def entries(content: Mapping | Sequence, key: str, path: Path, keys: Sequence[str]) -> Sequence[Mapping]:
    """The list under ``key``, whose entries have these ``keys``. Raises ``UserError`` where it is not so."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list):
        raise UserError(f"{path}: no list {key!r} in it, so it is no official file of that kind")
    for number, entry in enumerate(found):
        missing = [k for k in keys if not isinstance(entry, Mapping) or k not in entry]
        if missing:
            raise UserError(f"{path}: entry {number + 1} of {key!r} has no {missing[0]!r}")
    return found


def coco_image(folder: Path, subset: str, image: int) -> Path:
    """``train2014/COCO_train2014_000000000009.jpg``; of 2017 without the prefix."""
    prefix = "" if subset.endswith("2017") else f"COCO_{subset}_"
    return folder / subset / f"{prefix}{image:012d}.jpg"
