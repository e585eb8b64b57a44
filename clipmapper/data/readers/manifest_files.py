"""The rows of a manifest: JSON, CSV or Parquet, each with the file and line that it comes from."""

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmapper.data.record import Problem
from clipmapper.data.text_files import (
    RepeatedKey,
    check_file,
    is_text,
    not_utf8,
    open_text,
    other_kind,
    parsed_json,
    read_json,
)
from clipmapper.errors import UserError

Naming = Callable[[Any], Any]


def naming(feature: object) -> Naming | None:
    """Return a function that turns a value of this feature (as ``Features.to_dict`` writes it) into one with
    names; None where it has no classes. A number without a name (−1: the label is unknown) becomes None."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return (lambda value: _name(names, value)) if isinstance(names, list) else None
    if isinstance(feature, Sequence) and not isinstance(feature, str):
        return _each(naming(feature[0])) if len(feature) == 1 else None
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") in ("Sequence", "List", "LargeList") and "feature" in feature:
        return _each(naming(feature["feature"]))
    inner = {name: found for name, of in feature.items() if (found := naming(of)) is not None}
    return (lambda value: _fields(inner, value)) if inner else None


def namings(features: object) -> dict[str, Naming]:
    """Return the :func:`naming` of each column that has classes."""
    if not isinstance(features, Mapping):
        return {}
    return {name: found for name, of in features.items() if (found := naming(of)) is not None}


def named(row: Mapping, by: Mapping[str, Naming]) -> dict:
    """A row with names for numbers."""
    return {name: by[name](value) if name in by else value for name, value in row.items()}


def features_in_parquet(metadata: Mapping[bytes, bytes] | None) -> object:
    """Return the features that ``datasets`` has written into a Parquet file's schema; None if it has not."""
    try:
        return parsed_json((metadata or {})[b"huggingface"].decode())["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _name(names: list, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(names[value]) if 0 <= value < len(names) else None
    return value


def _each(of: Naming | None) -> Naming | None:
    if of is None:
        return None

    def each(value: Any) -> Any:
        if isinstance(value, Mapping):  # a list of objects, which `datasets` gives as an object of lists
            parted = {k: [of({k: one}) for one in v] if isinstance(v, list) else v for k, v in value.items()}
            return {k: [one[k] for one in v] if isinstance(v, list) else v for k, v in parted.items()}
        return [of(one) for one in value] if isinstance(value, list | tuple) else value

    return each


def _fields(inner: Mapping[str, Naming], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_fields(inner, one) for one in value]
    return named(value, inner) if isinstance(value, Mapping) else value


Row = tuple[str, Mapping | Problem]  # file and line, and the row or what is wrong with the line

# Python's limit of 131,072 characters a field is less than an image in base64 has.
_LONGEST_FIELD = 2**30
_LISTS = ("answers", "captions")  # columns of a CSV whose cells may hold several texts
_IMAGES = ("image", "image_base64")
_ROWS = ("data", "rows", "records", "examples")  # what an object that holds all rows may call them
_BAD_NUMBER = "a number of too many digits"


def manifest_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises ``UserError`` for a file that is not there or of another kind."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        kind = other_kind(check_file(path))
        what = f"; this is {kind}" if kind else ""
        raise UserError(f"{path}: a manifest is a file {', '.join(_READERS)}{what}")
    yield from reader(path)


def _json_lines(path: Path) -> Iterator[Row]:
    """A line each; one object or list that holds them all is read too."""
    other = 0  # lines that are not UTF-8
    with open_text(path) as file:
        # Universal line ends: a file of an old Mac's has carriage returns alone.
        file.reconfigure(newline=None)
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            text = line.strip("\ufeff \t\r\n")
            if not text:
                continue
            if not is_text(text):
                other += 1
                if other == 1:
                    yield source, Problem(source, not_utf8(number))
                continue
            try:
                row = parsed_json(text)
            except json.JSONDecodeError as error:
                # Perhaps written over several lines. What opens one, or is called .json, is nothing else.
                sure = path.suffix.lower() == ".json" or text in ("[", "{")
                if number == 1 and (rows := _whole(path, sure)) is not None:
                    yield from rows
                    return
                yield source, Problem(source, "not JSON", f"{error.msg} at character {error.pos + 1}")
            except RecursionError:
                yield source, Problem(source, "not JSON", "nested too deeply")
            except RepeatedKey as error:
                yield source, Problem(source, "a key twice", str(error))
            except ValueError:
                yield source, Problem(source, "not JSON", _BAD_NUMBER)
            else:
                if number == 1 and (rows := _rows_in(path, row)) is not None:
                    yield from rows
                    return
                if isinstance(row, dict):
                    yield source, row
                else:
                    yield source, Problem(source, "not an object", f"{text[:40]}; write {{...}}")


def _whole(path: Path, sure: bool) -> Iterator[Row] | None:
    """The rows of a file that is one JSON text, None where it is none; if it is ``sure`` to be meant as one,
    raises ``UserError`` where it can't be read."""
    try:
        content = read_json(path)
    except UserError:
        if sure:
            raise
        return None
    rows = _rows_in(path, content)
    return rows if rows is not None or not isinstance(content, dict) else iter([(str(path), content)])


def _rows_in(path: Path, content: object) -> Iterator[Row] | None:
    """The objects of a list, or of the list that an object holds under a usual name."""
    if isinstance(content, dict) and not any(name in content for name in _IMAGES):
        lists = [name for name in _ROWS if isinstance(content.get(name), list)]
        if len(lists) > 1:
            raise UserError(f"{path}: several lists, {' and '.join(lists)}; one of them may hold the rows")
        content = content[lists[0]] if lists else None
    if not isinstance(content, list) or not any(isinstance(row, dict) for row in content):
        return None
    return (
        (source, row if isinstance(row, dict) else Problem(source, "not an object", str(row)[:40]))
        for number, row in enumerate(content, 1)
        for source in [f"{path}:row {number}"]
    )


def _csv(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open_text(path) as file:
            first = file.readline()
            skipped = 1 if re.match(r'"?sep=.', first, re.IGNORECASE) else 0  # Excel's own first line
            if skipped:
                first = file.readline()
            file.seek(0)
            for _ in range(skipped):
                file.readline()
            reader = csv.reader(file, strict=True, delimiter=_delimiter(first))
            yield from _csv_rows(path, reader, skipped)
    finally:
        csv.field_size_limit(before)


def _delimiter(first: str) -> str:
    """Guess the delimiter from a table's first line: comma, semicolon (Excel in other countries) or tab."""
    parted = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in ",;\t"}
    return max(parted, key=lambda mark: parted[mark])


def _csv_rows(path: Path, reader, skipped: int) -> Iterator[Row]:
    columns: list[str] | None = None
    other = False
    while True:
        number = reader.line_num + skipped + 1
        source = f"{path}:{number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield source, Problem(source, "not CSV", str(error))
            return
        if not any(cells):
            continue
        if not is_text("".join(cells)):
            if not other:
                yield source, Problem(source, not_utf8(number))
            if columns is None:
                return
            other = True
            continue
        if columns is None:
            columns = [cell.strip() for cell in cells]
            if twice := sorted(name for name in set(columns) if name and columns.count(name) > 1):
                yield source, Problem(source, "the same column twice", ", ".join(twice))
                return
            if not any(name in columns for name in _IMAGES):
                what = f"there is {', '.join(name[:60] for name in columns[:10])}"
                yield source, Problem(source, "no column image or image_base64 in the first line", what)
                return
        elif len(cells) != len(columns):
            what = f"{len(cells)}, the first line has {len(columns)}"
            yield source, Problem(source, "wrong number of columns", what)
        else:
            row = {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()}
            try:
                yield source, {name: _several(cell) if name in _LISTS else cell for name, cell in row.items()}
            except json.JSONDecodeError as error:
                yield source, Problem(source, "not a list in JSON", f"{error.doc[:40]!r} ({error.msg})")
            except RepeatedKey as error:
                yield source, Problem(source, "a key twice", str(error))
            except RecursionError:
                yield source, Problem(source, "not a list in JSON", "nested too deeply")
            except ValueError:
                yield source, Problem(source, "not a list in JSON", _BAD_NUMBER)


def _several(cell: str) -> list:
    """The entries of a cell: a list in JSON, or texts between |."""
    return parsed_json(cell) if cell.lstrip().startswith("[") else cell.split("|")


def _parquet(path: Path) -> Iterator[Row]:
    check_file(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'clipmapper[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            labels = namings(features_in_parquet(file.schema_arrow.metadata))
            for part in file.iter_batches(batch_size=1024):
                for row in part.to_pylist():
                    number += 1
                    row = named(row, labels) if labels else row
                    yield (
                        f"{path}:row {number}",
                        {key: value for key, value in row.items() if value is not None},
                    )
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = None if (head := check_file(path)).startswith(b"PAR1") else other_kind(head)
        kind = kind or (None if head else "an empty file")
        reason = "text in it that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"{path}: not a readable Parquet file ({kind or reason.splitlines()[0]})") from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
