"""Writing records into Arrow columns as they are read, batch by batch."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipmapper.data.record import Problem, Record
from clipmapper.data.tables.base import Records, packed
from clipmapper.data.tables.columns import (
    BYTES_FILE,
    IMAGES_FILE,
    IN_FILE,
    IN_OBJECT,
    PREFIXES_FILE,
    RECORDS_FILE,
    ROWS,
    TABLES,
    TEXTS_FILE,
    Columns,
    RecordTable,
    StoredBytes,
)

_DIGITS = "0123456789"


class TableBuilder:
    """Records, added one by one, become :class:`RecordTable`\\ s.

    ``folder``: where the files go, which is there; None: everything stays in memory.

    Records of one ``image_id`` have one image: that of the first of them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.split_names: list[str | None] = []
        self._files = {name: _Writer(folder, name, schema) for name, schema in TABLES.items()}
        self._records, self._images = self._files[RECORDS_FILE], self._files[IMAGES_FILE]
        self._image_numbers: dict[str, int] = {}
        self._texts: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._objects: list = []
        self._offset = 0
        self._ids: list[np.ndarray] = []
        self._latest_ids: list[int] = []

    def add(self, split: str | None, record: Record) -> None:
        prefix, number = _numbered(record.source)
        id_number = id_text = None
        if isinstance(record.id, int) and -(2**63) <= record.id < 2**63:
            id_number = record.id
        elif isinstance(record.id, int) or record.id != os.path.basename(record.source):
            id_text = json.dumps(record.id).encode()
        image = self._image_numbers.get(record.image_id)
        if image is None:
            image = self._image_numbers[record.image_id] = len(self._image_numbers)
            self._add_image(record)
        self._records.add((
            self._split(split),
            id_number,
            id_text,
            image,
            None if record.question is None else packed(record.question),
            [self._text(answer) for answer in record.answers],
            [packed(caption) for caption in record.captions],
            self._text(record.family),
            self._prefixes.setdefault(prefix, len(self._prefixes)),
            number,
            None if record.truth is None else packed(str(record.truth.path)),
        ))  # fmt: skip
        self._latest_ids.append(hash((split, record.id)))
        if len(self._latest_ids) == ROWS:
            self._ids.append(np.array(self._latest_ids, np.int64))
            self._latest_ids.clear()

    def extend(self, split: str | None, records: Iterable[Record]) -> None:
        for record in records:
            self.add(split, record)

    def finish(self) -> "FinishedTable":
        """Everything that was added. Nothing can be added any more."""
        for name, found in ((TEXTS_FILE, self._texts), (PREFIXES_FILE, self._prefixes)):
            for text in found:
                self._files[name].add((packed(text),))
        tables = {name: file.finish() for name, file in self._files.items()}
        columns = (
            Columns.mapped(self.folder, self._objects)
            if self.folder
            else Columns(None, tables, self._objects)
        )
        ids = np.concatenate([*self._ids, np.array(self._latest_ids, np.int64)])
        self._image_numbers.clear()
        return FinishedTable(columns, self.split_names, ids)

    def _add_image(self, record: Record) -> None:
        image, path, offset, size = record.image, None, 0, IN_FILE
        if isinstance(image, Path):
            if str(image) != record.image_id:
                path = packed(str(image))
        elif isinstance(image, bytes | StoredBytes) and self.folder is not None:
            image = image if isinstance(image, bytes) else image.read()
            offset, size = self._offset, len(image)
            with (self.folder / BYTES_FILE).open("ab") as file:
                file.write(image)
            self._offset += size
        else:
            offset, size = len(self._objects), IN_OBJECT
            self._objects.append(image)
        self._images.add((packed(record.image_id), path, offset, size))

    def _split(self, name: str | None) -> int:
        if name not in self.split_names:
            self.split_names.append(name)
        return self.split_names.index(name)

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))


class FinishedTable:
    """Columns, the names of the splits in the order in which they first came, and digests of ids."""

    def __init__(self, columns: Columns, split_names: Sequence[str | None], ids: np.ndarray) -> None:
        self.columns, self.split_names, self._ids = columns, list(split_names), ids

    def splits(self) -> dict[str | None, RecordTable]:
        return splits_of(self.columns, self.split_names)

    def without_doubles(self) -> tuple[dict[str | None, RecordTable], list[Problem]]:
        """The splits without records whose id another of the split has, and these as problems, by line.

        The captions of an image may come one by one, all with the image's id.
        """
        problems, dropped = [], []
        _, inverse, counts = np.unique(self._ids, return_inverse=True, return_counts=True)
        again = np.flatnonzero(counts[inverse] > 1)
        if len(again):
            # Rows of a group in their order; what has captions of the first's image is no mistake.
            again = again[np.argsort(inverse[again], kind="stable")]
            group = inverse[again]
            first = again[np.searchsorted(group, group)]
            lengths, images = self.columns.records["captions"].lengths(), self.columns.image_of
            fine = (lengths[again] > 0) & (images[again] == images[first])
            suspects = np.isin(group, group[~fine])
            firsts: dict[tuple[int, int | str], int] = {}
            for row in again[suspects].tolist():
                key = (int(self.columns.split_of[row]), self.columns.id(row))
                before = firsts.setdefault(key, row)
                if before != row and not (lengths[row] and images[row] == images[before]):
                    what = f"{key[1]!r} is that of {self.columns.source(before)} too"
                    problems.append((row, Problem(self.columns.source(row), "the same id twice", what)))
                    dropped.append(row)
        splits = self.splits()
        if dropped:
            splits = {name: some.take(~np.isin(some.rows, dropped)) for name, some in splits.items()}
        return splits, [problem for _, problem in sorted(problems, key=lambda found: found[0])]


def splits_of(columns: Columns, names: Sequence[str | None]) -> dict[str | None, RecordTable]:
    """Name of each split → its records in their order."""
    rows = columns.split_of
    return {name: RecordTable(columns, np.flatnonzero(rows == n)) for n, name in enumerate(names)}


def as_table(records: Iterable[Record]) -> Records:
    """Records as a table in memory, if they are not in columns already."""
    if isinstance(records, Records):
        return records
    builder = TableBuilder()
    builder.extend(None, records)
    return RecordTable(builder.finish().columns)


class _Writer:
    """Rows into an Arrow file, or into a table in memory."""

    def __init__(self, folder: Path | None, name: str, schema: pa.Schema) -> None:
        self.schema, self.rows, self.batches = schema, [], []
        self.sink = None if folder is None else pa.OSFile(str(folder / name), "wb")
        self.file = None if folder is None else pa.ipc.new_file(self.sink, schema)

    def add(self, row: tuple) -> None:
        self.rows.append(row)
        if len(self.rows) == ROWS:
            self._flush()

    def finish(self) -> pa.Table | None:
        if self.rows:
            self._flush()
        if self.file is None:
            return pa.Table.from_batches(self.batches, self.schema)
        self.file.close()
        self.sink.close()
        return None

    def _flush(self) -> None:
        columns = [
            pa.array(list(column), field.type)
            for column, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)
        ]
        batch = pa.record_batch(columns, schema=self.schema)
        self.rows.clear()
        if self.file is None:
            self.batches.append(batch)
        else:
            self.file.write_batch(batch)


def _numbered(source: str) -> tuple[str, int]:
    """A source as what comes before its line's number and the number, -1 where there is none."""
    prefix = source.rstrip(_DIGITS)
    digits = source[len(prefix) :]
    exact = 0 < len(digits) < 19 and (digits[0] != "0" or digits == "0")
    return (prefix, int(digits)) if exact else (source, -1)


def tables_of(splits: Mapping[str, Sequence[Record]]) -> dict[str, RecordTable]:
    """The splits as tables over the same columns: as they are, or made in memory."""
    columns = [getattr(some, "columns", None) for some in splits.values()]
    if columns and columns[0] is not None and all(own is columns[0] for own in columns):
        return dict(splits)
    builder = TableBuilder()
    for name, records in splits.items():
        builder.split_names.append(name)
        builder.extend(name, records)
    return builder.finish().splits()
