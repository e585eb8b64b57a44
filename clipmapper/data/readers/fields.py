"""The entries of an official file, decoded one by one, and the fields that they have to have.

A schema is a dictionary, name → :class:`Field`; every official reader describes its entries by one.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from clipmapper.data.record import Problem, stop_for
from clipmapper.data.text_files import DECODER, RepeatedKey, is_text, open_text, read_json
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


_SHOWN = 60
_NUMBERS = 2**63
REQUIRED = object()
# ["a"], ['a' 'b'], [1, 2], [a, b], [], ('a',), array(['a'], dtype=object); not [unanswerable].
_LIST = re.compile(
    r"""(array\()?(\[\s*(['"{\[\d-].*|.*,.*)?\]|\(\s*['"].*['"]\s*,(\s*['"].*['"])?\s*\))(,.*)?\)?""",
    re.DOTALL,
)


class _Wrong(Exception):
    """(what is there instead)"""


@dataclass(frozen=True)
class Field:
    """``read``: value → (what is taken for it, whether it was converted), or raises. ``allowed``: in words.
    ``default``: what a field stands for that is absent, null or an empty list; none: it may not be."""

    read: Callable[[Any], tuple[Any, bool]]
    allowed: str
    default: Any = REQUIRED

    def or_else(self, default: Any) -> "Field":
        """The same field, which may be absent."""
        return Field(self.read, self.allowed, default)


def _number(value: Any) -> tuple[int, bool]:
    whole = isinstance(value, float) and value.is_integer()
    written = (
        isinstance(value, str) and len(value) < 30 and value.strip().isascii() and value.strip().isdigit()
    )
    if not (type(value) is int or whole or written) or not 0 <= int(value) < _NUMBERS:
        raise _Wrong
    return int(value), type(value) is not int


def _flag(value: Any) -> tuple[bool, bool]:
    if isinstance(value, bool):
        return value, False
    if value in (0, 1):
        return bool(value), True
    raise _Wrong


def _text(value: Any) -> tuple[str, bool]:
    if type(value) is str:
        found, converted = value, False
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        found, converted = written_number(value), True
    else:
        raise _Wrong
    if not found.strip() or not is_text(found) or "\0" in found:
        raise _Wrong
    return found, converted


def written_number(value: int | float) -> str:
    """A number as people write it: 2.0 is "2"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _key(value: Any) -> tuple[int | str, bool]:
    return (value, False) if type(value) is int and abs(value) < _NUMBERS else _text(value)


def _texts(of: str | None) -> Callable[[Any], tuple[list[str], bool]]:
    def read(value: Any) -> tuple[list[str], bool]:
        converted = not isinstance(value, list)
        if converted and isinstance(value, str) and is_list_as_text(value):
            raise _Wrong(f"a list written as text, {shown(value)}")
        entries = [value] if converted else value
        if not entries:
            raise _Wrong("an empty list")
        found = []
        for entry in entries:
            plain = entry[of] if of is not None and isinstance(entry, Mapping) and of in entry else entry
            try:
                text, of_number = _text(plain)
            except _Wrong:
                raise _Wrong(f"{shown(entry)} among them" if isinstance(value, list) else "") from None
            converted |= of_number
            found.append(text)
        return found, converted

    return read


FLAG = Field(_flag, "true or false")
NUMBER = Field(_number, "a whole number")
TEXT = Field(_text, "a text")
KEY = Field(_key, "a whole number or a text")
TEXTS = Field(_texts(None), "a list of texts")
ANSWERS = Field(_texts("answer"), "a list of answers")

Schema = Mapping[str, Field]


@dataclass
class Entries:
    """Reads the entries of files and takes note of what is wrong and of what was converted."""

    problems: list[Problem] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)

    def listed(self, content: object, key: str | None, path: Path, schema: Schema) -> Iterator[dict]:
        """The good entries of the list under ``key`` (None: of the file itself), each with its ``source``.

        Raises ``UserError`` where there is no such list.
        """
        if key is None:
            found = content
            if not isinstance(found, list):
                raise UserError(f"{path}: {_kind(content)}, not a list; it is no official file of that kind")
        else:
            found = content.get(key) if isinstance(content, Mapping) else None
            if not isinstance(found, list):
                is_object = isinstance(content, Mapping)
                inside = _instead(content, key) if is_object else f"it is {_kind(content)}"
                what = f"no list {key!r} in it ({inside}), so it is no official file of that kind"
                raise UserError(f"{path}: {what}")
        yield from self._read(found, key, path, schema)

    def of_file(self, path: Path, key: str, what: str, schema: Schema) -> Iterator[dict]:
        """:meth:`listed` of a file's content, of which no more than one entry is in memory. ``what``: the
        file is said to be, where it is not there. Raises ``UserError`` also for a file that is no JSON."""
        try:
            yield from self._read(entries_of(path, key, what), key, path, schema)
        except (ValueError, RecursionError):
            next(self.listed(read_json(path, what), key, path, schema), None)  # says what is wrong
            raise

    def _read(self, entries: Iterable[object], key: str | None, path: Path, schema: Schema) -> Iterator[dict]:
        where = "" if key is None else f" of {key!r}"
        for number, entry in enumerate(entries, 1):
            source = f"{path}: entry {number}{where}"
            if (read := self.entry(source, entry, schema)) is not None:
                yield read

    def entry(self, source: str, entry: object, schema: Schema) -> dict | None:
        """The fields of ``schema`` and "source"; None where one of them is wrong."""
        if not isinstance(entry, Mapping):
            self.wrong(source, "not an object", shown(entry))
            return None
        found: dict[str, Any] = {"source": source}
        for name, wanted in schema.items():
            value = entry.get(name)
            if wanted.default is not REQUIRED and (value is None or value == []):
                found[name] = wanted.default
                continue
            if name not in entry:
                self.wrong(source, f"no {name!r}")
                return None
            try:
                found[name], converted = wanted.read(value)
            except _Wrong as wrong:
                self.wrong(source, f"{name!r} is not {wanted.allowed}", str(wrong) or shown(value))
                return None
            if converted:
                self.converted[f"{name!r} to {wanted.allowed}"] += 1
        return found

    def wrong(self, source: str, kind: str, detail: str = "") -> None:
        self.problems.append(Problem(source, kind, detail))

    def stop(self) -> None:
        """Raise ``UserErrors`` where anything was wrong."""
        stop_for(self.problems)

    def notes(self, path: Path | str) -> list[str]:
        """List the conversions of values, for the summary of the data."""
        if not self.converted:
            return []
        counts = ", ".join(f"{what} ({count} times)" for what, count in self.converted.items())
        return [f"{path}: converted {counts}"]


def is_list_as_text(text: str) -> bool:
    """Whether a list was written into a text, as by JSON, Python or NumPy. Its letters are no answers."""
    return _LIST.fullmatch(text.strip()) is not None


def shown(value: object) -> str:
    """A value in a message."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number of too many digits"
    said = "null" if value is None else repr(value).lower() if isinstance(value, bool) else repr(value)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."


def _instead(content: Mapping, key: str) -> str:
    if key in content:
        return f"there is {shown(content[key])}"
    return f"there is {', '.join(str(name)[:_SHOWN] for name in list(content)[:10]) or 'nothing'}"


def _kind(content: object) -> str:
    names: Sequence[tuple[type, str]] = ((Mapping, "an object"), (list, "a list"), (str, "a text"))
    return next((name for kind, name in names if isinstance(content, kind)), "a single value")
