"""Make records of the rows of a manifest or of a Hugging Face data set."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from clipmapper.data.answers import settled
from clipmapper.data.readers.fields import is_list_as_text, shown, written_number
from clipmapper.data.record import OTHER, MaskFile, Problem, Record, StoredImage
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.text_files import is_text

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
    "mask": ("mask",),
}
_NAME_OF = {column: name for name, columns in _NAMES.items() for column in columns}
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_SHOWN = 60
_KINDS_OF_ROWS = 100  # whose columns are looked at


class Mistake(Exception):
    """(kind of problem, detail)"""


class RowReader:
    """Turns rows into records and takes note of what is wrong.

    ``folder``: what relative paths of images are relative to. ``table``: where :meth:`add` puts records;
    those of a row without a split to the split ``None``. ``problems``: in the order of rows, but for ids that
    come twice (:meth:`clipmapper.data.tables.builder.FinishedTable.without_doubles`). ``normalised``: how
    many questions had answers that were changed. ``unread``: columns that mean nothing here.
    """

    def __init__(self, folder: Path, table: TableBuilder | None = None) -> None:
        self.folder, self.table = folder, table
        self.problems: list[Problem] = []
        self.normalised = 0
        self.unread: dict[str, None] = {}
        self._seen: set[tuple] = set()

    def add(self, source: str, row: Mapping, split: str | None = None) -> None:
        """``split``: the one that the file stands for; its rows may not say another."""
        columns = tuple(row)
        if columns not in self._seen and len(self._seen) < _KINDS_OF_ROWS:
            self._seen.add(columns)
            self.unread |= {str(name): None for name in columns if name not in _NAME_OF}
        found = self.read(source, row, split)
        if found is not None:
            self.table.add(*found)

    def read(self, source: str, row: Mapping, split: str | None) -> tuple[str | None, Record] | None:
        """The split and the record; None where the row is wrong, which is noted."""
        try:
            given = _all_given(row)
            said = _split(given["split"])
            if split is not None and said is not None and said != split:
                raise Mistake("another split than its file's", f"{said!r} in the file for {split}")
            split = split or said
            record = self._record(source, row, given, answered=split != "test")
        except Mistake as mistake:
            self.problems.append(Problem(source, *mistake.args))
            return None
        return split, record

    def _record(self, source: str, row: Mapping, given: Mapping, answered: bool) -> Record:
        named = [str(name)[:_SHOWN] for name, value in row.items() if not _absent(value)]
        there = ", ".join(named[:10]) or "nothing"
        if given["image"] is None and given["image_base64"] is None:
            raise Mistake("no image", f"give image or image_base64; there is {there}")
        image, image_id = _image(given["image"], given["image_base64"], self.folder)
        has_caption, has_question = given["captions"] is not None, given["question"] is not None
        # An image of a test split, to be captioned. (Among questions it is refused behind the last line.)
        bare = not answered and given["answers"] is None and not has_question
        if not (has_caption or has_question or bare):
            raise Mistake("no question and no captions", f"there is {there}")
        if has_caption and (has_question or given["answers"] is not None):
            raise Mistake("a question and captions", "a line is about one of them")
        question, answers, captions = None, (), ()
        if has_caption:
            captions = (
                () if bare and given["captions"] == [] else tuple(_texts("captions", given["captions"]))
            )
        elif has_question:
            question = _text("question", given["question"])
            if given["answers"] is not None:
                answers = tuple(self._alike(_texts("answers", given["answers"])))
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
            truth=None if given["mask"] is None else MaskFile(_mask(given["mask"], self.folder)),
        )

    def _alike(self, answers: list[str]) -> list[str]:
        """Answers that are all alike, normalised. The official accuracy leaves them as they are, which is
        right for its own data, in lower case: no answer of the vocabulary would ever equal "Yes"."""
        if len(set(answers)) > 1 or (found := settled(answers[0])) == answers[0]:
            return answers
        self.normalised += 1
        return [found] * len(answers)


def _all_given(row: Mapping) -> dict[str, object]:
    """Return the row's value under each of the names, None where it has none."""
    given = dict.fromkeys(_NAMES)
    for column, value in row.items():
        name = _NAME_OF.get(column)
        if name is None or _absent(value):
            continue
        if given[name] is not None:
            return {name: _given(row, aliases) for name, aliases in _NAMES.items()}  # which raises
        given[name] = value
    return given


def _given(row: Mapping, aliases: tuple[str, ...]) -> object:
    there = [name for name in aliases if not _absent(row.get(name))]
    if len(there) > 1:
        raise Mistake("the same thing twice", f"both {' and '.join(there)}")
    return row[there[0]] if there else None


def _absent(value: object) -> bool:
    """A cell without a value; pandas writes NaN for it."""
    return value is None or (isinstance(value, float) and value != value)


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
            value = decoded_base64(_text("image_base64", encoded))
        except ValueError as error:
            raise Mistake("image_base64 is not base64", str(error)) from error
    if isinstance(value, str) and value.strip():
        return _path(value, folder)
    if isinstance(value, Mapping):  # as Hugging Face data sets are written to Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, StoredImage):
        return value, str(value)
    if isinstance(value, bytes):
        return value, hashlib.blake2b(value, digest_size=16).hexdigest()
    if not isinstance(value, str) or not value.strip():
        raise Mistake("no image", f"{shown(value)} is not a path")
    return _path(value, folder)


@lru_cache(maxsize=1 << 14)  # several questions in succession are about one image
def _path(value: str, folder: Path) -> tuple[Path, str]:
    text = _text("image", value)
    if looks_like_base64(text):
        raise Mistake("looks like base64: use image_base64", shown(text))
    if re.match(r"[a-z]{2,}://", text.lower()):
        raise Mistake("an address, not a file", f"{shown(text)}; download the image")
    path = Path(os.path.normpath(folder / os.path.expanduser(text)))
    if "\\" in text and os.sep == "/" and not os.path.lexists(path):  # written on Windows
        if re.match(r"[A-Za-z]:|\\\\", text):
            raise Mistake("a path of Windows", f"{shown(text)}; make it relative to data.images")
        path = Path(os.path.normpath(folder / text.replace("\\", "/")))
    return path, str(path)


def _mask(value: object, folder: Path) -> Path:
    path, _ = _path(_text("mask", value), folder)
    if not path.is_file():
        raise Mistake("no such mask", f"mask={shown(str(path))}: no such file")
    return path


def _texts(name: str, value: object) -> list[str]:
    """One text, or a list of them; the entries of VQA's own lists, ``{"answer": ...}``, are read too."""
    one = name.rstrip("s")
    if isinstance(value, Mapping) and isinstance(value.get(one), list):  # as `datasets` keeps such lists
        value = value[one]
    entries = value if isinstance(value, list | tuple) else [value]
    if len(entries) == 1 and isinstance(entries[0], str) and is_list_as_text(entries[0]):
        raise Mistake(f"{name}: a list written as text", f"{shown(entries[0])}; write a list")
    if not entries:
        raise Mistake(f"no {name}", "an empty list")
    return [_text(name, e[one] if isinstance(e, Mapping) and one in e else e) for e in entries]


def _text(name: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        value = written_number(value)
    if not isinstance(value, str):
        raise Mistake(f"{name} not text", shown(value))
    if "\0" in value or not is_text(value):
        raise Mistake(f"{name} not text", "a NUL character or half of a surrogate pair in it")
    if not value.strip():
        raise Mistake(f"empty {name}")
    return value.strip()


def _id(value: object) -> int | str:
    text = _text("id", value)
    # A larger number stays text: no column of numbers holds it.
    return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else text


_LONGEST_NAME = 255  # bytes, of a file
# JPEG, PNG, GIF and WebP files begin so.
_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")


def looks_like_base64(text: str) -> bool:
    """Whether what stands for a path is an image's bytes."""
    text = _unquoted(text)
    if text.lower().startswith("data:"):
        return True
    # A path may begin as a JPEG does, or be long, but its names have an end.
    if len(text) < 60 or not re.fullmatch(r"[A-Za-z0-9+/_=\r\n-]+", text):
        return False
    return text.startswith(_STARTS) or max(map(len, text.split("/"))) > _LONGEST_NAME or len(text) > 4096


def decoded_base64(text: str) -> bytes:
    """The bytes; a ``data:`` address, lines and the alphabet of addresses (- and _) are read too.

    Raises ``ValueError``, with a reason, for what is no base64.
    """
    text = _unquoted(text)
    if text.lower().startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("a data: address that is not in base64")
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    if not text:
        raise ValueError("there is nothing in it")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _unquoted(text: str) -> str:
    """Without the marks of Python's bytes: a table has them where b64encode's result was written as it is."""
    text = text.strip()
    return text[2:-1] if re.fullmatch(r"b(['\"]).*\1", text, re.DOTALL) else text
