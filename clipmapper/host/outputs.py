"""Before a command does anything: can its output be written, does its server answer; files are whole."""

import errno
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from clipmapper.errors import UserError, visible

# What a file system says that has no room: the disk is full, the quota is used up, the file is too large.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIED = b"\0" * 4096


def check_folder(folder: Path, named: str) -> None:
    """Write a file to ``folder`` and remove it again, with folders that had to be made for it.

    ``named``: the setting, as the user gives it (``output=…``). Raises ``UserError`` where it can't be.
    """
    _check(folder, ".tried", named)


def check_file(file: Path, named: str) -> None:
    """The same of a file, which may be there already and stays as it is."""
    try:
        if file.is_dir():
            raise UserError(f"{named}: can't be written (it is a folder)")
        if file.exists():
            if not file.is_file():  # a device, a pipe: there is nothing to try
                return
            os.close(os.open(file, os.O_WRONLY))
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: can't be written ({_reason(error)})") from error
    _check(file.parent, f".{file.name}", named)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Inside, write a file that is there as a whole, or not at all: what was there before stays then.

    Nothing else is left where there is no room. ``durable``: it is on the disk (fsync) before it takes its
    place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Write a :func:`whole_file`, text as UTF-8. Returns the path."""
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def _check(folder: Path, stem: str, named: str) -> None:
    made: list[Path] = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir(exist_ok=True)
                made.append(part)
        descriptor, tried = tempfile.mkstemp(prefix=f"{stem}.", dir=folder)
        try:
            os.write(descriptor, _TRIED)
            os.fsync(descriptor)  # a quota, or a full disk far away, may speak up only here
        finally:
            os.close(descriptor)
            os.unlink(tried)
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: can't be written ({_reason(error)})") from error
    finally:
        for part in reversed(made):
            try:
                part.rmdir()
            except OSError:  # another command has written to it meanwhile
                break


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        path = Path(error.filename)
        there = [part for part in (path, *path.parents) if part.is_file()]
        if there:
            return f"{there[0]} is a file"
    return getattr(error, "strerror", None) or str(error)


_LONGEST = 200  # bytes: file systems take 255, and something is put behind it
# What Windows takes for a device, whatever follows the dot.
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{device}{number}" for device in ("com", "lpt") for number in range(10)),
}


def file_name_problem(name: str) -> str | None:
    """Why a name can be no file or folder inside another one; None if it can.

    It is to stay in its folder (no separators, no ``..``) and to be a name on every common system.
    """
    if not name.strip():
        return "is empty"
    quoted = repr(name if len(name) <= 60 else f"{name[:60]}…")
    if visible(name) != name or "\t" in name or "\n" in name:
        return f"{quoted} has control characters"
    if found := [character for character in name if character in '/\\:*?"<>|']:
        return f"{quoted} is to be the name of a folder, which can't have {found[0]}"
    if name.strip() != name or name.endswith(".") or name.startswith("."):
        return f"{quoted} is to be the name of a folder, which can't begin or end with a dot or a space"
    if name.split(".")[0].lower() in _DEVICES:
        return f"{quoted} is a device on Windows"
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST:
        return f"{quoted} is longer than {_LONGEST} bytes"
    return None


PATIENCE = 10.0  # seconds for an answer


def check_answer(address: str, said: str, instead: str) -> None:
    """Raise ``UserError`` where no server answers at ``address``; a refusal is an answer.

    ``said``: the setting, as the user gives it. ``instead``: what to do without the server.
    """
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE):
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(
            f"{said}: no answer from {address} within {PATIENCE:.0f} s ({reason}). {instead}"
        ) from error
