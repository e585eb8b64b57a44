"""The members of a tar file as names and places. Nothing in it is unpacked, followed or opened as a path."""

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
