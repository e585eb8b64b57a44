"""The entries of a list in a large JSON file, decoded one by one: the file is never in memory as a whole."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from clipmapper.data.text_files import DECODER, RepeatedKey, is_text, open_text
from clipmapper.errors import UserError

_PIECE = 1 << 22  # characters that are read at a time
_AHEAD = 2  # what may come between the "1" and the "5" of a number: "1e+5"
_SPACE = re.compile(r"[ \t\n\r]*")


class NotAsExpected(ValueError):
    """The file is no JSON, or no object with the list. To read it as a whole says what it is."""


def entries_of(path: Path, key: str, what: str = "") -> Iterator[object]:
    """Yield the entries of the list under ``key`` of the object that a file holds, as ``json`` decodes them.

    Raises ``UserError`` as :func:`~clipmapper.data.text_files.open_text` and for a key that is there twice;
    :class:`NotAsExpected` or another ``ValueError`` or ``RecursionError`` for anything else, at any entry.
    """
    with open_text(path, what) as file:
        reading, seen = _Reading(file), False
        for name in reading.names():
            if name == key:
                if seen:
                    raise UserError(f"{path}: {key!r} is in it twice")
                seen = True
                yield from reading.entries()
            elif reading.next() == "[":
                for _ in reading.entries():
                    pass
            else:
                reading.value()
        if not seen or reading.next():
            raise NotAsExpected


class _Reading:
    """A place in a text that is read piece by piece."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.place = file, "", 0
        self.decode = DECODER.raw_decode

    def names(self) -> Iterator[object]:
        """Yield the names in an object; the value of each is to be read before the next one."""
        for _ in self._items("{", "}"):
            name = self.value()
            self._take(":")
            yield name

    def entries(self) -> Iterator[object]:
        """Yield the entries of a list."""
        for _ in self._items("[", "]"):
            yield self.value()

    def next(self) -> str:
        """The character that comes next behind white space; "" at the end."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def value(self) -> object:
        self.next()
        while True:
            try:
                found, end = self.decode(self.text, self.place)
            except RepeatedKey:
                raise
            except ValueError:  # perhaps the rest of it is not read yet
                if not self._more():
                    raise
                continue
            if end + _AHEAD < len(self.text) or not self._more():
                self.place = end
                return found

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self.next() != closing:
            yield
            while self.next() == ",":
                self._take(",")
                yield
        self._take(closing)

    def _take(self, character: str) -> None:
        if self.next() != character:
            raise NotAsExpected
        self.place += 1

    def _more(self) -> bool:
        piece = self.file.read(_PIECE)
        if not is_text(piece):
            raise NotAsExpected
        if piece:
            self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)
