"""The members of a tar file, and the samples that they are: an image and what was asked or said about it.

Nothing in a tar file is unpacked, followed or opened as a path.
"""

import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from clipmapper.data.readers.rows import RowReader
from clipmapper.data.record import Problem
from clipmapper.data.records import Record
from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError

LONGEST_NAME = 255  # bytes
_BLOCK = tarfile.BLOCKSIZE
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ODD_KINDS = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


class Damage(Exception):
    """(kind of problem, detail): the shard ends here, what came before it is whole."""


@dataclass(frozen=True, slots=True)
class Member:
    """An ordinary file inside a tar file: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image file inside a tar file, a :class:`~clipmapper.data.records.StoredImage`."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded file. Raises ``UserError`` where the shard has gone or was cut."""
        return read_part(self.shard, self.offset, self.size)


def read_part(shard: Path, offset: int, size: int) -> bytes:
    """Some bytes of a file. Raises ``UserError`` where they are not there."""
    try:
        with open(shard, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
            while 0 < len(content) < size and (
                more := os.pread(file.fileno(), size - len(content), offset + len(content))
            ):
                content += more
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror}") from error
    if len(content) != size:
        raise UserError(f"{shard}: it has been cut off since the run began")
    return content


def open_shard(path: Path) -> BinaryIO:
    """A local file of the ordinary kind. Raises ``UserError`` for another (a pipe would be waited for)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def members(file: BinaryIO) -> Iterator[Member]:
    """The ordinary files of a tar file in order; folders are passed over.

    Raises ``Damage`` where the tar file is damaged or was cut off, and ``UserError`` for what is in no honest
    shard: links, devices, sparse files, and names that lead out of it.
    """
    shard, size = file.name, os.fstat(file.fileno()).st_size
    start = file.read(6)
    for magic, kind in _PACKED.items():
        if start.startswith(magic):
            raise UserError(f"{shard}: compressed ({kind}); unpack it: nothing in it has a place to seek to")
    file.seek(0)
    if not start:
        raise Damage("an empty file")
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  the file is the caller's
        while (found := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all
            if found.isdir():
                continue
            name = _checked_name(shard, found.name)
            if found.type in _ODD_KINDS or not found.isreg() or found.issparse():
                what = _ODD_KINDS.get(found.type, "not an ordinary file")
                raise UserError(f"{shard}: {name} is {what}; a shard holds files only")
            if found.size < 0 or found.offset_data + found.size > size:
                raise Damage("cut off", f"in the middle of {name}")
            yield Member(name, found.offset_data, found.size)
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, tarfile.ReadError) and "unexpected end" in str(error):
            raise Damage("cut off", "in the middle of its last file") from error
        raise Damage("not a readable tar file", " ".join(str(error).split())) from error
    # tarfile takes what is no header for the end.
    file.seek(tar.offset)
    end = file.read(_BLOCK)
    if len(end) < _BLOCK:
        raise Damage("cut off", "it has no end mark")
    if end.strip(b"\0"):
        raise Damage("damaged", f"no header at byte {tar.offset}")
    if file.read(1 << 20).strip(b"\0"):
        raise Damage("files behind its end mark", "tar files that were joined? keep them apart")


def _checked_name(shard: str, name: str) -> str:
    shown = ascii(name[:60])
    if len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        raise UserError(f"{shard}: the name of a file in it is too long: {shown}...")
    if not name or any(ord(c) < 32 or ord(c) == 127 for c in name) or "\\" in name:
        raise UserError(f"{shard}: {shown} is no name of a file")
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{shard}: the name of a file in it leads elsewhere: {shown}")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
_LONGEST_TEXT = 2**24  # bytes
# What scripts/make_shards.py writes of a record.
KEPT = ("id", "image_id", "question", "answers", "family", "captions")
# What is taken of others' JSON; all else that is there (url, sha256, status) is passed over.
_TAKEN = (
    "id",
    "question_id",
    "question",
    "answers",
    "answer",
    "captions",
    "caption",
    "family",
    "answer_type",
)


class NoSample(Exception):
    """(kind of problem, detail)"""


@dataclass
class Sample:
    """Files of one key. ``json``, ``text``: None where there is none."""

    key: str
    images: list[Member] = field(default_factory=list)
    json: Member | None = None
    text: Member | None = None
    others: list[str] = field(default_factory=list)


def sample_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a file's name, as webdataset divides it: at the first dot behind the last slash.

    The suffix is in lower case and what is behind its last dot. None for what belongs to no sample: hidden
    files, metadata (``__…__``), names without a suffix.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _dot, suffix = base.partition(".")
    if not stem or not suffix or (not folder and stem.startswith("__") and stem.endswith("__")):
        return None
    return f"{folder}{slash}{stem}", suffix.rpartition(".")[2].lower()


def add_member(samples: dict[str, Sample], member: Member, problems: Callable[[str, str], None]) -> None:
    """Put a file to its sample. ``problems`` is told of a file that is there twice."""
    named = sample_name(member.name)
    if named is None:
        return
    key, suffix = named
    sample = samples.setdefault(key, Sample(key))
    if suffix in IMAGE_SUFFIXES:
        if any(image.name == member.name for image in sample.images):
            problems(member.name, "the same file twice")
        else:
            sample.images.append(member)
    elif suffix in ("json", "txt"):
        place = "json" if suffix == "json" else "text"
        if getattr(sample, place) is not None:
            problems(member.name, "the same file twice")
        else:
            setattr(sample, place, member)
    else:
        sample.others.append(suffix)


def check_sample(sample: Sample) -> None:
    """Raises ``NoSample`` where it is not one image and what was said about it."""
    if len(sample.images) > 1:
        raise NoSample("several images of one key", ", ".join(image.name for image in sample.images))
    if not sample.images:
        there = ", ".join(
            [*(["json"] if sample.json else []), *(["txt"] if sample.text else []), *sample.others]
        )
        raise NoSample("no image", f"only {there}")
    if sample.json is None and sample.text is None:
        more = f"; {', '.join(sample.others)} is not read" if sample.others else ""
        raise NoSample("an image without text", f"give a .txt (a caption) or .json{more}")
    for member in (sample.json, sample.text):
        if member is not None and member.size > _LONGEST_TEXT:
            raise NoSample("too much text", f"{member.size} bytes in {member.name}")


def told_about(
    image: ShardImage, key: str, shard: Path, told: bytes | None, text: bytes | None, answered: bool
) -> list[Record]:
    """The records of an image, from the contents of its ``.json`` and ``.txt``.

    JSON of ``scripts/make_shards.py`` is a list of records, taken as it is. Others' is an object or a list of
    them with ``question`` and ``answers`` (``answer``), or ``captions`` (``caption``). A ``.txt`` is a
    caption, for an image about which no question and no list of captions is told. ``answered``: whether a
    question needs answers (those of a test split do not).

    Raises ``NoSample`` for what is none of that.
    """
    source = f"{shard}: {key}"
    rows = [] if told is None else _parsed(told)
    if rows and all(isinstance(row, dict) and set(row) == set(KEPT) for row in rows):
        return [_as_kept(row, image, source) for row in rows]
    if text is not None and not any(row.get("question") or row.get("captions") for row in rows):
        try:
            rows = [{**(rows[0] if len(rows) == 1 else {}), "captions": text.decode("utf-8-sig")}]
        except UnicodeDecodeError as error:
            raise NoSample("not UTF-8 text", f"byte {error.start + 1} of its .txt") from error
        rows[0].pop("caption", None)
    if not rows:
        raise NoSample("nothing told about the image", "its .json is an empty list")
    found = []
    for number, row in enumerate(rows):
        taken = {name: row[name] for name in _TAKEN if row.get(name) is not None}
        if taken.get("question") is not None:  # a caption beside a question is not what is asked
            taken.pop("caption", None)
            taken.pop("captions", None)
        if "answers" in taken:
            taken.pop("answer", None)
        if taken.get("id") is None and taken.get("question_id") is None:
            taken["id"] = key if len(rows) == 1 else f"{key}/{number}"
        reader = RowReader(Path())
        split_and_record = reader.read(source, taken | {"image": image}, None if answered else "test")
        for problem in reader.problems:
            raise NoSample(problem.kind, problem.detail)
        _, record = split_and_record
        found.append(record)
    return found


def _parsed(told: bytes) -> list[dict]:
    try:
        parsed = parsed_json(told.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NoSample("not UTF-8 text", f"byte {error.start + 1} of its .json") from error
    except RecursionError as error:
        raise NoSample("not JSON", "nested too deeply") from error
    except ValueError as error:
        raise NoSample("not JSON", str(error)) from error
    rows = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(row, dict) for row in rows):
        raise NoSample("not an object in JSON", ascii(parsed)[:60])
    return rows


def _as_kept(row: Mapping, image: ShardImage, source: str) -> Record:
    """A record as it was written, type for type: a Record holds what it is given."""
    texts = [row["image_id"], row["family"], *([] if row["question"] is None else [row["question"]])]
    lists = [row["answers"], row["captions"]]
    right = isinstance(row["id"], int | str) and not isinstance(row["id"], bool)
    right = right and all(isinstance(some, list) for some in lists)
    if not right or not all(isinstance(text, str) for text in [*texts, *lists[0], *lists[1]]):
        raise NoSample("not a record of scripts/make_shards.py", ascii(row)[:60])
    if (row["question"] is None) != bool(row["captions"]):
        raise NoSample("not a record of scripts/make_shards.py", "it has a question and captions, or neither")
    return Record(
        row["id"], image, row["image_id"], row["question"], tuple(row["answers"]), row["family"],
        tuple(row["captions"]), source,
    )  # fmt: skip


def as_problem(shard: Path, name: str, mistake: Iterable[str]) -> Problem:
    kind, detail = (*mistake, "")[:2]
    return Problem(f"{shard}: {name}", kind, detail)
