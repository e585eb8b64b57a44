"""The rows of a manifest: JSON lines, CSV or Parquet, each with the file and line that it comes from."""

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from clipmapper.data.problems import Problem
from clipmapper.errors import UserError

Row = tuple[str, Mapping | Problem]  # file and line, and the row or what is wrong with the line

# Python's limit of 131,072 characters a field is less than an image in base64 has.
_LONGEST_FIELD = 2**30
_LISTS = ("answers", "captions")  # columns of a CSV whose cells may hold several texts


def manifest_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises ``UserError`` for a file that is not there or of another kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a manifest is a file {', '.join(_READERS)}")
    yield from reader(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError:
                yield source, Problem(source, "not UTF-8 text")
            except json.JSONDecodeError as error:
                yield source, Problem(source, "not JSON", f"{error.msg} at character {error.pos + 1}")
            except RecursionError:
                yield source, Problem(source, "not JSON", "nested too deeply")
            else:
                if isinstance(row, dict):
                    yield source, row
                else:
                    yield source, Problem(source, "not an object", f"{text[:40]}; write {{...}}")


def _csv(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(path, csv.reader(file, strict=True))
    except UnicodeDecodeError as error:
        yield str(path), Problem(str(path), "not UTF-8 text", f"byte {error.start + 1} of a part of it")
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path, reader) -> Iterator[Row]:
    columns: list[str] | None = None
    while True:
        source = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield source, Problem(source, "not CSV", str(error))
            return
        if not any(cells):
            continue
        if columns is None:
            columns = [cell.strip() for cell in cells]
            if twice := sorted(name for name in set(columns) if name and columns.count(name) > 1):
                yield source, Problem(source, "the same column twice", ", ".join(twice))
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


def _several(cell: str) -> list:
    """The entries of a cell: a list in JSON, or texts between |."""
    return json.loads(cell) if cell.lstrip().startswith("[") else cell.split("|")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'clipmapper[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for part in file.iter_batches(batch_size=1024):
                for row in part.to_pylist():
                    number += 1
                    yield (
                        f"{path}:row {number}",
                        {key: value for key, value in row.items() if value is not None},
                    )
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
