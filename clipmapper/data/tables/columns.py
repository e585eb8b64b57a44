"""Records in Arrow columns, mapped into memory: a sequence whose records are made when they are asked for."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmapper.data.record import MaskFile, Record, StoredImage
from clipmapper.data.tables.base import Records, unpacked
from clipmapper.errors import UserError

ROWS = 1 << 14  # of every batch of an Arrow file but its last

RECORDS = pa.schema([
    ("split", pa.int8()),
    ("id_number", pa.int64()),
    ("id_text", pa.large_binary()),  # in JSON; neither of the two: the source without its folder
    ("image", pa.int32()),  # row of the images
    ("question", pa.large_binary()),
    ("answers", pa.list_(pa.int32())),  # rows of the texts
    ("captions", pa.list_(pa.large_binary())),
    ("family", pa.int32()),
    ("prefix", pa.int32()),  # of the source: a row of the prefixes, with the number behind it
    ("number", pa.int64()),
    ("mask", pa.large_binary()),  # the path of a MaskFile
])  # fmt: skip
# ``size``: of an image in the file of bytes; IN_FILE: a file; IN_OBJECT: the object of number ``offset``.
IMAGES = pa.schema([
    ("key", pa.large_binary()),  # Record.image_id
    ("path", pa.large_binary()),  # None: it is the key
    ("offset", pa.int64()),
    ("size", pa.int64()),
])  # fmt: skip
TEXTS = pa.schema([("text", pa.large_binary())])
IN_FILE, IN_OBJECT = -1, -2
RECORDS_FILE, IMAGES_FILE, TEXTS_FILE, PREFIXES_FILE, BYTES_FILE = (
    "records.arrow", "images.arrow", "texts.arrow", "prefixes.arrow", "image_bytes"
)  # fmt: skip
TABLES = {RECORDS_FILE: RECORDS, IMAGES_FILE: IMAGES, TEXTS_FILE: TEXTS, PREFIXES_FILE: TEXTS}


def as_numpy(numbers: pa.Array) -> np.ndarray:
    """Numbers without gaps; nothing is copied. (``to_numpy`` would import pandas, for half a second.)"""
    return np.from_dlpack(numbers)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """An image file that lies inside another file."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded image. Raises ``UserError`` where the file has gone or was cut."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}") from error
        if len(found) != self.size:
            raise UserError(f"{self.file}: it was cut off")
        return found


class Column:
    """A column of an Arrow table whose batches all have :data:`ROWS` rows but the last."""

    def __init__(self, table: pa.Table, name: str) -> None:
        self.parts = table.column(name).chunks

    def __getitem__(self, row: int):
        return self.parts[row // ROWS][row % ROWS].as_py()

    def numbers(self) -> np.ndarray:
        """All of a column of numbers without gaps."""
        if not self.parts:
            return np.empty(0, np.int64)
        return np.concatenate([as_numpy(part) for part in self.parts])

    def lists(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        """Yield each batch of a column of lists: where lists begin (one more than rows) and their values."""
        for part in self.parts:
            offsets = as_numpy(part.offsets)
            yield offsets - offsets[0], part.values[int(offsets[0]) : int(offsets[-1])]

    def lengths(self) -> np.ndarray:
        """Return the length of every list in a column of lists."""
        found = [np.diff(as_numpy(part.offsets)) for part in self.parts]
        return np.concatenate(found) if found else np.empty(0, np.int32)


class Columns:
    """The four Arrow tables, of a ``folder`` or in memory, that all tables of one data set share.

    ``objects``: images that only Python knows. Travels to other processes by the folder's name.
    """

    def __init__(
        self, folder: Path | None, tables: dict[str, pa.Table], objects: Sequence[StoredImage | bytes] = ()
    ) -> None:
        self.folder, self.tables, self.objects = folder, tables, objects
        records, images = tables[RECORDS_FILE], tables[IMAGES_FILE]
        self.records = {name: Column(records, name) for name in RECORDS.names}
        self.images = {name: Column(images, name) for name in IMAGES.names}
        self.count = records.num_rows
        self.texts = Column(tables[TEXTS_FILE], "text")
        self.prefixes = [unpacked(one) for one in tables[PREFIXES_FILE].column("text").to_pylist()]

    @classmethod
    def mapped(cls, folder: Path, objects: Sequence = ()) -> "Columns":
        """Map the files of a folder into memory, where all processes share them.

        Raises ``ValueError`` or ``OSError`` for files that are not such.
        """
        tables = {}
        for name, schema in TABLES.items():
            table = pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all()
            if table.schema != schema:
                raise ValueError(f"{name}: other columns")
            tables[name] = table
        return cls(folder, tables, objects)

    def __reduce__(self):
        if self.folder is not None:
            return Columns.mapped, (self.folder, self.objects)
        return Columns, (None, self.tables, self.objects)

    def image(self, row: int) -> Path | StoredImage | bytes:
        """The image of a row of the images."""
        size = self.images["size"][row]
        if size == IN_OBJECT:
            return self.objects[self.images["offset"][row]]
        if size >= 0:
            return StoredBytes(self.folder / BYTES_FILE, self.images["offset"][row], size)
        path = self.images["path"][row]
        return Path(unpacked(self.images["key"][row] if path is None else path))

    def is_file(self, row: int) -> bool:
        """Whether the image of this row is a file of its own."""
        return self.images["size"][row] == IN_FILE

    def image_id(self, row: int) -> str:
        return unpacked(self.images["key"][row])

    def text(self, row: int) -> str:
        return unpacked(self.texts[row])

    def source(self, row: int) -> str:
        number = self.records["number"][row]
        prefix = self.prefixes[self.records["prefix"][row]]
        return prefix if number < 0 else f"{prefix}{number}"

    def id(self, row: int) -> int | str:
        number = self.records["id_number"][row]
        if number is not None:
            return number
        text = self.records["id_text"][row]
        return os.path.basename(self.source(row)) if text is None else json.loads(text)

    def question(self, row: int) -> str | None:
        found = self.records["question"][row]
        return None if found is None else unpacked(found)

    def answers(self, row: int) -> tuple[str, ...]:
        return tuple(map(self.text, self.records["answers"][row]))

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(map(unpacked, self.records["captions"][row]))

    def truth(self, row: int) -> MaskFile | None:
        path = self.records["mask"][row]
        return None if path is None else MaskFile(Path(unpacked(path)))

    def record(self, row: int) -> Record:
        image = self.records["image"][row]
        return Record(
            id=self.id(row),
            image=self.image(image),
            image_id=self.image_id(image),
            question=self.question(row),
            answers=self.answers(row),
            family=self.text(self.records["family"][row]),
            captions=self.captions(row),
            source=self.source(row),
            truth=self.truth(row),
        )

    @cached_property
    def image_of(self) -> np.ndarray:
        """Row of the images of every record, int32[records]."""
        return self.records["image"].numbers()

    @cached_property
    def family_of(self) -> np.ndarray:
        """Row of the texts of every record, int32[records]."""
        return self.records["family"].numbers()

    @cached_property
    def split_of(self) -> np.ndarray:
        """int8[records]"""
        return self.records["split"].numbers()


class RecordTable(Records):
    """Some rows of :class:`Columns`, in an order. A slice is such a table as well; nothing is copied.

    ``rows``: int32[records].
    """

    def __init__(self, columns: Columns, rows: np.ndarray | None = None) -> None:
        self.columns = columns
        self.rows = np.arange(columns.count, dtype=np.int32) if rows is None else rows.astype(np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice):
        if isinstance(place, slice):
            return RecordTable(self.columns, self.rows[place])
        return self.columns.record(int(self.rows[place]))

    def take(self, places: np.ndarray) -> "RecordTable":
        return RecordTable(self.columns, self.rows[places])

    @property
    def images(self) -> np.ndarray:
        return self.columns.image_of[self.rows]

    @property
    def families(self) -> np.ndarray:
        return self.columns.family_of[self.rows]

    def family_name(self, number: int) -> str:
        return self.columns.text(number)

    def lengths(self, name: str) -> np.ndarray:
        return self.columns.records[name].lengths()[self.rows]

    def bare(self) -> np.ndarray:
        """Which records are an image alone, without a question and without captions: bool[records]."""
        asked = self.columns.tables[RECORDS_FILE].column("question").is_valid().combine_chunks()
        asked = asked.to_numpy(zero_copy_only=False)[self.rows]
        return ~asked & (self.lengths("captions") == 0)

    def different_questions(self) -> tuple[pa.Array, np.ndarray]:
        column = self.columns.tables[RECORDS_FILE].column("question")
        asked = column.take(pa.array(self.rows)).combine_chunks().dictionary_encode()
        order = as_numpy(pc.sort_indices(asked.dictionary)).astype(np.int64)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return asked.dictionary.take(pa.array(order)), rank[as_numpy(asked.indices)]

    def captions(self) -> Iterator[tuple[str, ...]]:
        return (self.columns.captions(row) for row in self.rows.tolist())


def together(parts: Sequence[RecordTable]) -> RecordTable:
    """Tables over the same columns, one behind the other."""
    if any(part.columns is not parts[0].columns for part in parts):
        raise ValueError("tables of different columns")
    return RecordTable(parts[0].columns, np.concatenate([part.rows for part in parts]))
