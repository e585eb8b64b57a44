"""From a row of a manifest, or of a Hugging Face data set, to a record."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from clipmapper.data.problems import Problem
from clipmapper.data.records import OTHER, Record, StoredImage

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

    ``folder``: what relative paths of images are relative to. ``splits``: name → records; a row without a
    split is under ``None``. ``problems``: in the order of rows. ``beside``: the reader of another file of the
    same data, with which texts are shared.

    An id may come again in another split, as when a model of COCO's captions is validated on nocaps' images.
    """

    def __init__(self, folder: Path, beside: "RowReader | None" = None) -> None:
        self.folder = folder
        self.splits: dict[str | None, list[Record]] = {}
        self.problems: list[Problem] = []
        self._ids: dict[tuple[str | None, int | str], Record] = {}
        self._texts: dict[str, str] = beside._texts if beside else {}

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
        first = self._ids.setdefault((split, record.id), record)
        # The captions of an image may come one by one, all with the image's id.
        if first is not record and not (record.captions and first.image_id == record.image_id):
            what = f"{record.id!r} is that of {first.source} too"
            self.problems.append(Problem(source, "the same id twice", what))
            return
        self.splits.setdefault(split, []).append(record)

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
            captions = self._kept(_texts("captions", given["captions"]))
        else:
            question = _text("question", given["question"])
            if given["answers"] is not None:
                answers = self._kept(_texts("answers", given["answers"]))
            elif answered:
                raise Mistake("no answers", f"to {question[:_SHOWN]!r}")
        family = OTHER if given["family"] is None else _text("family", given["family"])
        return Record(
            id=os.path.basename(source) if given["id"] is None else _id(given["id"]),
            image=image,
            image_id=image_id,
            question=question,
            answers=answers,
            family=self._texts.setdefault(family, family),
            captions=captions,
            source=source,
        )

    def _kept(self, texts: Iterable[str]) -> tuple[str, ...]:
        """The same strings, each kept once: most answers are one of a few thousand."""
        return tuple(self._texts.setdefault(text, text) for text in texts)


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
