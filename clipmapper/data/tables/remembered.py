"""Tables of records, kept beside the data: read once, mapped into memory by every later run and process."""

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import platformdirs
import pyarrow as pa

from clipmapper.data.content import file_stamp
from clipmapper.data.record import Problem
from clipmapper.data.tables.builder import splits_of
from clipmapper.data.tables.columns import (
    BYTES_FILE,
    IMAGES_FILE,
    IN_FILE,
    IN_OBJECT,
    PREFIXES_FILE,
    RECORDS_FILE,
    TABLES,
    TEXTS_FILE,
    Columns,
    RecordTable,
    as_numpy,
)

FOLDER = ".clipmapper"
_FORMAT = 2  # to be raised with every change of what is read or written
_ENTRY = "table.json"
_PART = 1 << 20


class Found(NamedTuple):
    """The outcome of reading. ``notes``: lines that each run says. ``more``: kept besides, as JSON."""

    columns: Columns
    splits: Mapping[str | None, RecordTable]
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()
    more: Mapping | None = None


def remembered(
    reader: str,
    files: Sequence[Path],
    settings: Mapping,
    read: Callable[[Path | None], Found],
    objects: Sequence = (),
) -> Found:
    """Call ``read``, or take what it gave before for the same files and settings.

    Parameters
    ----------
    reader : a word for the format.
    files : all files that are read. They are as they were if size, inode and the times of the last change of
        content and of inode are; the first says which folder ``.clipmapper`` lies in. Where that cannot be
        written it is the user's cache folder; where that cannot be either, nothing is kept.
    settings : what the table depends on besides, as JSON.
    read : is given an empty folder to build in (None: in memory). What has problems is not kept.
    objects : of :class:`~clipmapper.data.tables.columns.Columns`.

    Other processes that want the same wait for the first.
    """
    try:
        key = {
            "format": _FORMAT, "reader": reader, "settings": settings, "folder": os.getcwd(),
            "files": [[str(file), file_stamp(file)] for file in files],
        }  # fmt: skip
    except (OSError, ValueError):
        return read(None)  # which says what is wrong with the file
    home, why = _home(files[0])
    if home is None:
        return _with(read(None), why)
    name = _digest({**key, "files": [str(file) for file in files]})
    entry = home / f"{name}-{_digest(key['files'])}"
    try:
        with filelock.FileLock(home / f"{name}.lock"):
            found, damage = _mapped(entry, key, objects)
            if found is not None:
                return _with(found, why)
            return _with(_made(entry, name, key, read), damage, why)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None and not _within(error.filename, home):
            raise
        return _with(read(None), f"nothing is remembered in {home} ({error.strerror or error})")


def _made(entry: Path, name: str, key: Mapping, read: Callable[[Path | None], Found]) -> Found:
    home = entry.parent
    # Of this data: tables of files as they were, and what a run that was killed has left.
    for old in home.glob(f"{name}-*"):
        shutil.rmtree(old, ignore_errors=True)
    temporary = home / f"{name}-{os.getpid()}.unfinished"
    temporary.mkdir()
    try:
        found = read(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if found.problems:
        weakref.finalize(found.columns, shutil.rmtree, temporary, ignore_errors=True)
        return found
    names = list(found.splits)
    content = {
        "key": key,
        "splits": names,
        "notes": list(found.notes),
        "more": found.more,
        "files": {file: _file_digest(temporary / file) for file in TABLES},
        "bytes": _size(temporary / BYTES_FILE),
    }
    (temporary / _ENTRY).write_text(json.dumps(content))
    os.rename(temporary, entry)
    columns = Columns.mapped(entry, found.columns.objects)
    return Found(columns, splits_of(columns, names), (), found.notes, found.more)


def _mapped(entry: Path, key: Mapping, objects: Sequence) -> tuple[Found | None, str | None]:
    """Open what is kept there; None if it can't be used, and what is wrong with it if anything is there."""
    if not entry.is_dir():
        return None, None
    try:
        content = json.loads((entry / _ENTRY).read_text())
        names, notes = content["splits"], content["notes"]
        if content["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of other files")
        if not all(isinstance(note, str) for note in notes):
            raise ValueError("notes")
        for file in TABLES:
            if content["files"][file] != _file_digest(entry / file):
                raise ValueError(f"{file} has changed")
        if _size(entry / BYTES_FILE) != content["bytes"]:
            raise ValueError(f"{BYTES_FILE} has changed")
        _check(entry, len(names), len(objects))
        columns = Columns.mapped(entry, objects)
        return Found(columns, splits_of(columns, names), (), notes, content["more"]), None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"{entry}: not as it was written ({reason}), so the data are read again"


def _check(entry: Path, splits: int, objects: int) -> None:
    """Raise ``ValueError`` for numbers that point nowhere. Read batch by batch, not mapped: nothing stays."""
    rows = {}
    for file in (TEXTS_FILE, PREFIXES_FILE, IMAGES_FILE, RECORDS_FILE):
        rows[file] = 0
        with pa.OSFile(str(entry / file)) as source:
            reader = pa.ipc.open_file(source)
            if reader.schema != TABLES[file]:
                raise ValueError(f"{file}: other columns")
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                rows[file] += batch.num_rows
                if file == IMAGES_FILE:
                    _check_images(batch, objects, _size(entry / BYTES_FILE))
                if file == RECORDS_FILE:
                    for column, count in (
                        ("split", splits),
                        ("image", rows[IMAGES_FILE]),
                        ("family", rows[TEXTS_FILE]),
                        ("prefix", rows[PREFIXES_FILE]),
                    ):
                        _check_range(batch.column(column), count)
                    _check_range(batch.column("answers").flatten(), rows[TEXTS_FILE])


def _check_range(numbers: pa.Array, count: int) -> None:
    if numbers.null_count:
        raise ValueError("a number is missing")
    found = as_numpy(numbers)
    if len(found) and not 0 <= found.min() <= found.max() < count:
        raise ValueError("a number that points nowhere")


def _check_images(batch: pa.RecordBatch, objects: int, size: int) -> None:
    offset, length = (batch.column(name) for name in ("offset", "size"))
    if offset.null_count or length.null_count:
        raise ValueError("a number is missing")
    offset, length = as_numpy(offset), as_numpy(length)
    limits = np.where(length == IN_OBJECT, objects - 1, np.where(length == IN_FILE, 0, size - length))
    if (length < IN_OBJECT).any() or (offset < 0).any() or (offset > limits).any():
        raise ValueError("an image that is nowhere")


def _home(file: Path) -> tuple[Path | None, str | None]:
    """Where tables of a file are kept, and what is to be said of that."""
    beside = Path(os.path.abspath(file)).parent / FOLDER
    if _writable(beside):
        return beside, None
    cache = Path(platformdirs.user_cache_dir("clipmapper", appauthor=False))
    if _writable(cache):
        return (
            cache,
            f"{beside.parent} can't be written, so what was read and checked is remembered in {cache}",
        )
    return None, f"neither {beside.parent} nor {cache} can be written, so nothing that was read is remembered"


def _writable(folder: Path) -> bool:
    tried = folder / f".{os.getpid()}.tried"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tried.touch()
        tried.unlink()
    except OSError:
        return False
    return True


def _with(found: Found, *lines: str | None) -> Found:
    return found._replace(notes=[*found.notes, *(line for line in lines if line is not None)])


def _within(name: str | bytes, folder: Path) -> bool:
    return Path(os.path.abspath(os.fsdecode(name))).is_relative_to(folder)


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
