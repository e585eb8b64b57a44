"""From a row of a manifest, or of a Hugging Face data set, to a record."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from clipmapper.data.problems import Problem
from clipmapper.data.record import OTHER, Record, StoredImage
from clipmapper.data.table_builder import TableBuilder

# What a column may be called.
_NAMES = {
    "image": ("image",),
    "image_base64": ("image_base64",),
    "id": ("id", "question_id"),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "captions": ("captions", "caption"),
    "family": ("family", "answer_type"),
    "split": ("split",),
}
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_SHOWN = 60


class Mistake(Exception):
    """(kind of problem, detail)"""


class RowReader:
    """Turns rows into records and takes note of what is wrong.

    ``folder``: what relative paths of images are relative to. ``table``: where records go; those of a row
    without a split to the split ``None``. ``problems``: in the order of rows, but for ids that come twice
    (:meth:`clipmapper.data.table_builder.FinishedTable.without_doubles`).
    """

    def __init__(self, folder: Path, table: TableBuilder) -> None:
        self.folder, self.table = folder, table
        self.problems: list[Problem] = []

    def add(self, source: str, row: Mapping, split: str | None = None) -> None:
        """``split``: the one that the file stands for; its rows may not say another."""
        try:
            given = {name: _given(row, aliases) for name, aliases in _NAMES.items()}
            said = _split(given["split"])
            if split is not None and said is not None and said != split:
                raise Mistake("another split than its file's", f"{said!r} in the file for {split}")
            split = split or said
            record = self._record(source, row, given, answered=split != "test")
        except Mistake as mistake:
            self.problems.append(Problem(source, *mistake.args))
            return
        self.table.add(split, record)

    def _record(self, source: str, row: Mapping, given: Mapping, answered: bool) -> Record:
        there = ", ".join(map(str, row)) or "nothing"
        if given["image"] is None and given["image_base64"] is None:
            raise Mistake("no image", f"give image or image_base64; there is {there}")
        image, image_id = _image(given["image"], given["image_base64"], self.folder)
        has_caption, has_question = given["captions"] is not None, given["question"] is not None
        if not (has_caption or has_question):
            raise Mistake("no question and no captions", f"there is {there}")
        if has_caption and (has_question or given["answers"] is not None):
            raise Mistake("a question and captions", "a line is about one of them")
        question, answers, captions = None, (), ()
        if has_caption:
            captions = tuple(_texts("captions", given["captions"]))
        else:
            question = _text("question", given["question"])
            if given["answers"] is not None:
                answers = tuple(_texts("answers", given["answers"]))
            elif answered:
                raise Mistake("no answers", f"to {question[:_SHOWN]!r}")
        family = OTHER if given["family"] is None else _text("family", given["family"])
        return Record(
            id=os.path.basename(source) if given["id"] is None else _id(given["id"]),
            image=image,
            image_id=image_id,
            question=question,
            answers=answers,
            family=family,
            captions=captions,
            source=source,
        )


def _given(row: Mapping, aliases: tuple[str, ...]) -> object:
    there = [name for name in aliases if row.get(name) is not None]
    if len(there) > 1:
        raise Mistake("the same thing twice", f"both {' and '.join(there)}")
    return row[there[0]] if there else None


def _split(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.strip().lower() not in _SPLITS:
        raise Mistake("unknown split", f"{value!r} is not one of {', '.join(_SPLITS)}")
    return _SPLITS[value.strip().lower()]


def _image(value: object, encoded: object, folder: Path) -> tuple[Path | bytes | StoredImage, str]:
    """The image, and what it is told apart by: its path, or a digest of its bytes."""
    if value is not None and encoded is not None:
        raise Mistake("the same thing twice", "give image or image_base64")
    if encoded is not None:
        try:
            value = base64.b64decode(_text("image_base64", encoded), validate=True)
        except binascii.Error as error:
            raise Mistake("image_base64 is not base64", str(error)) from error
    if isinstance(value, Mapping):  # as Hugging Face data sets are written to Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, StoredImage):
        return value, str(value)
    if isinstance(value, bytes):
        return value, hashlib.blake2b(value, digest_size=16).hexdigest()
    if not isinstance(value, str) or not value.strip():
        raise Mistake("no image", f"{_shown(value)} is not a path")
    if re.match(r"[a-z]{2,}://", value.strip().lower()):
        raise Mistake("an address, not a file", f"{_shown(value)}; download the image")
    path = Path(os.path.normpath(folder / value.strip()))
    return path, str(path)


def _texts(name: str, value: object) -> list[str]:
    """One text, or a list of them; the entries of VQA's own lists, ``{"answer": ...}``, are read too."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise Mistake(f"no {name}", "an empty list")
    one = name.rstrip("s")
    return [_text(name, e[one] if isinstance(e, Mapping) and one in e else e) for e in entries]


def _text(name: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:  # not NaN
        value = f"{value:g}" if isinstance(value, float) else str(value)
    if not isinstance(value, str):
        raise Mistake(f"{name} not text", _shown(value))
    if not value.strip():
        raise Mistake(f"empty {name}")
    return value.strip()


def _id(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = _text("id", value)
    return int(text) if text.isdecimal() and str(int(text)) == text else text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
