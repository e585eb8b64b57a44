"""Text files as people have them: opened in one way, and told what they are where they are something else."""

import codecs
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from clipmapper.errors import UserError

# UTF-32's marks begin with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file itself",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"PK\x03\x04": "a zip archive (an Excel file is one too)",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it",
    b"%PDF": "a PDF",
    b"PAR1": "Parquet",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
}
_HEAD = 1024


def other_kind(head: bytes) -> str | None:
    """Name the kind of a file that begins with ``head``, if it is one that is often taken for another."""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[4:8] == b"ftyp":
        heic = head[8:11] in (b"hei", b"hev", b"mif")
        return "HEIC; save it as JPEG" if heic else "a video, or an image of a kind that is not known"
    text = head.lstrip(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page; a download that failed leaves one"
    if text.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML file"
    return None


def given_path(text: str | os.PathLike[str]) -> Path:
    """A path of the settings; ``~`` is the home folder, which no shell puts in behind ``key=``."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of an unknown user
        return Path(text)


def check_file(path: Path, what: str = "") -> bytes:
    """The first bytes of a file. Raises ``UserError`` where there is none or it can't be read; ``what`` (such
    as "the questions of train2014") is said to belong there."""
    belongs = f"; {what} should be there" if what else ""
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder, not a file{belongs}")
        if not path.is_file():
            raise UserError(f"{path}: no such file{belongs}")
        with path.open("rb") as file:
            return file.read(_HEAD)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)[:200]}: can't be read ({reason})") from error


def open_text(path: Path, what: str = "") -> TextIO:
    """A UTF-8 file, with or without a byte-order mark; bytes that are no UTF-8 become lone surrogates, for
    :func:`is_text` to find. Line ends are as they are in the file.

    Raises ``UserError`` for another encoding (UTF-16), another kind of file and an empty one.
    """
    head = check_file(path, what)
    if not head:
        raise UserError(f"{path}: no lines in it, the file is empty")
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    # Without a mark: of mostly Latin letters every other byte is 0.
    zeros = head[0::2].count(0), head[1::2].count(0)
    if marked is None and max(zeros) > 0.3 * len(head) / 2 and min(zeros) < max(zeros) / 4:
        marked = "UTF-16"
    if marked:
        raise UserError(f"{path}: {marked} text, not UTF-8; save it as UTF-8")
    if kind := other_kind(head):
        raise UserError(f"{path}: not a text file, but {kind}")
    if b"\0" in head:
        raise UserError(f"{path}: not a text file, there are NUL bytes in it")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def is_text(text: str) -> bool:
    """Whether all of it was UTF-8 in the file, and can be written again."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, what: str = "") -> str:
    """A whole file; raises ``UserError`` as :func:`open_text`, and where some of it is not UTF-8."""
    with open_text(path, what) as file:
        text = file.read()
    if not is_text(text):
        first = next(n for n, line in enumerate(text.splitlines(), 1) if not is_text(line))
        raise UserError(f"{path}: {not_utf8(first)}")
    return text


def not_utf8(line: int) -> str:
    return f"not UTF-8 text from line {line} on (Latin-1 or another code page, it seems); save it as UTF-8"


def text_lines(path: Path, what: str = "") -> Iterator[str]:
    """The lines of a whole file, ended as on any system, without their ends and byte-order marks."""
    # Not str.splitlines, which parts a line at characters that a caption may have (U+2028, form feed).
    for line in read_text(path, what).replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        yield line.strip("\ufeff")


class RepeatedKey(ValueError):
    """A key stands in one object twice, with different values: one of them would be lost without a word."""


def parsed_json(text: str) -> Any:
    """Decode as ``json.loads``. Raises :class:`RepeatedKey` besides."""
    return DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise RepeatedKey(f"{key[:60]!r} stands twice in one object, with different values")
    return found


class _Decoder(json.JSONDecoder):
    """Decodes with the collector of cycles switched off.

    Else it may run where a text that is nested too deeply has used up the stack: whatever finalizer it calls
    there fails, and Python prints that to a user who has a file to mend.
    """

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Decode as ``json.JSONDecoder.raw_decode``."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().raw_decode(s, idx)
        finally:
            if collects:
                gc.enable()


DECODER = _Decoder(object_pairs_hook=_object)  # made once: a manifest has a text in each line


def read_json(path: Path, what: str = "") -> object:
    """The content of a JSON file. Raises ``UserError`` as :func:`read_text`, and where it is no JSON."""
    text = read_text(path, what)
    try:
        return parsed_json(text)
    except json.JSONDecodeError as error:
        ended = error.msg.startswith("Unterminated string") or not text[error.pos :].strip()
        early = "; it ends too early, as of a download cut short" if ended else ""
        reason = f"{error.msg}, line {error.lineno}, character {error.colno}{early}"
    except RecursionError:
        reason = "nested too deeply"
    except RepeatedKey as error:
        reason = str(error)
    except ValueError:  # Python reads no number of more than 4300 digits
        reason = "a number of too many digits"
    raise UserError(f"{path}: not a readable JSON file ({reason})")
