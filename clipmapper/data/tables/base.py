"""Records as training and explanations ask for them: one by one, and in columns."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from clipmapper.data.record import Record


def packed(text: str) -> bytes:
    """A text as columns hold it: in bytes, because a Python string may hold half a surrogate pair."""
    return text.encode("utf-8", "surrogatepass")


def unpacked(text: bytes) -> str:
    """The text of :func:`packed`."""
    return text.decode("utf-8", "surrogatepass")


class Records(Sequence[Record]):
    """Records in an order. A slice is such a sequence as well. Equal to a list of equal records."""

    @abstractmethod
    def take(self, places: np.ndarray) -> "Records":
        """The records at these places (numbers, or a flag for each)."""

    @property
    @abstractmethod
    def images(self) -> np.ndarray:
        """Which image each record has: int32[records], the same number for the same ``image_id``."""

    @property
    @abstractmethod
    def families(self) -> np.ndarray:
        """A number for each record's family: int32[records]; :meth:`family_name` has its name."""

    @abstractmethod
    def family_name(self, number: int) -> str:
        """The family that has this number."""

    @abstractmethod
    def lengths(self, name: str) -> np.ndarray:
        """How many ``answers`` or ``captions`` each record has: int32[records]."""

    @abstractmethod
    def different_questions(self) -> tuple[pa.Array, np.ndarray]:
        """The different questions, in order and :func:`packed`, and which of them each record asks:
        int64[records]. Every record has one."""

    @abstractmethod
    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every record."""

    def family_counts(self) -> dict[str, int]:
        """How many records of each family there are, in alphabetical order."""
        counts = np.bincount(self.families)
        return {self.family_name(number): int(counts[number]) for number in self.family_numbers()}

    def family_numbers(self) -> list[int]:
        """The numbers of the families there are, in the alphabetical order of their names."""
        return sorted(np.unique(self.families).tolist(), key=self.family_name)

    def first_of_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the first record of each image, in order, and the place among them of every record's
        image: int64[images] and int64[records]."""
        _, first, inverse = np.unique(self.images, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return first[order], rank[inverse]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None


class RecordList(Records):
    """Records that are Python objects: those of a data set that is made in memory."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        self._image_numbers = _numbered(record.image_id for record in self.records)
        self._family_names, self._families = _numbered(record.family for record in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int | slice):
        return RecordList(self.records[place]) if isinstance(place, slice) else self.records[int(place)]

    def take(self, places: np.ndarray) -> "RecordList":
        return RecordList([self.records[place] for place in np.arange(len(self))[places].tolist()])

    @property
    def images(self) -> np.ndarray:
        return self._image_numbers[1]

    @property
    def families(self) -> np.ndarray:
        return self._families

    def family_name(self, number: int) -> str:
        return self._family_names[number]

    def lengths(self, name: str) -> np.ndarray:
        return np.array([len(getattr(record, name)) for record in self.records], np.int32)

    def different_questions(self) -> tuple[pa.Array, np.ndarray]:
        different = sorted({packed(record.question) for record in self.records})
        place = {text: number for number, text in enumerate(different)}
        number_of = np.array([place[packed(record.question)] for record in self.records], np.int64)
        return pa.array(different, pa.large_binary()), number_of

    def captions(self) -> Iterator[tuple[str, ...]]:
        return (record.captions for record in self.records)


def _numbered(names: Iterator[str]) -> tuple[list[str], np.ndarray]:
    """The different names in the order in which they first come, and the number of each."""
    numbers: dict[str, int] = {}
    of_each = [numbers.setdefault(name, len(numbers)) for name in names]
    return list(numbers), np.array(of_each, np.int32)
