"""The official files of one split of a public data set, and the rows that a converter makes of them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipmapper.data.readers.fields import Entries
from clipmapper.data.text_files import read_json


@dataclass(frozen=True)
class Source:
    """The official files of one split.

    Attributes
    ----------
    annotations : where answers have a file of their own.
    masks : a folder with ``0.npy`` and so on, by the number of the question (CLEVR-XAI).
    language : of the questions that are wanted (SLAKE).
    more : the other files, where a split has several as ``questions``.
    reading : takes note of what is wrong in them and of what was converted.
    told : counts what else is to be known of the result, such as entries that were left out.
    """

    questions: Path
    annotations: Path | None
    images: Path
    masks: Path | None = None
    language: str | None = None
    more: tuple[Path, ...] = ()
    reading: Entries = field(default_factory=Entries)
    told: Counter[str] = field(default_factory=Counter)

    def listed(self, key: str | None, what: str, schema: Mapping) -> Iterator[dict]:
        """The good entries of ``questions``."""
        return self.reading.listed(read_json(self.questions, what), key, self.questions, schema)

    def notes(self) -> list[str]:
        """What is to be said when everything was converted."""
        counts = [f"{self.questions}: {count} {what}" for what, count in self.told.items()]
        return [*self.reading.notes(self.questions), *counts]


# As a line of a manifest, and "source": file and place. ``image`` is a path, or the bytes of a file that has
# no name; ``mask`` the bytes of a PNG; ``split`` the official one, where a file holds more than one.
Row = dict[str, object]
