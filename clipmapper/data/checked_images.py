"""Which images have been opened and found readable, remembered by name, size and time."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipmapper.data.record_table import Columns, StoredBytes

FILE = "checked_images"
_DTYPE = np.dtype([("a", "<u8"), ("b", "<u8"), ("size", "<i8"), ("mtime", "<i8")])
_DIGEST = 16
_ABSENT = -1


def stamps(columns: Columns, images: Sequence[int]) -> np.ndarray:
    """What each image is known by: a digest of its name, the size of its file and when that was written
    (-1 for a file that is not there)."""
    found = np.zeros(len(images), _DTYPE)
    table = b"" if columns.folder is None else columns.folder.name.encode()
    here = os.getcwd()
    for place, row in enumerate(images):
        image = columns.image(row)
        size = mtime = 0
        if isinstance(image, Path):
            name = os.path.join(here, image).encode("utf-8", "surrogatepass")
            try:
                stat = os.stat(image)
                size, mtime = stat.st_size, stat.st_mtime_ns
            except (OSError, ValueError):
                size = _ABSENT
        else:
            # Bytes are known by their digest, rows of a data set by the table that was made of it.
            name = columns.image_id(row).encode("utf-8", "surrogatepass")
            name = b"bytes/" + name if isinstance(image, StoredBytes | bytes) else table + b"/" + name
        digest = hashlib.blake2b(name, digest_size=_DIGEST).digest()
        found[place] = (
            int.from_bytes(digest[:8], "little"),
            int.from_bytes(digest[8:], "little"),
            size,
            mtime,
        )
    return found


def known(folder: Path | None, asked: np.ndarray) -> np.ndarray:
    """Which of these :func:`stamps` are remembered in a folder: bool[images]."""
    store = _read(folder)
    if not len(store):
        return np.zeros(len(asked), bool)
    place = np.searchsorted(store["a"], asked["a"]).clip(max=len(store) - 1)
    return (store[place] == asked) & (asked["size"] != _ABSENT)


def remember(folder: Path | None, fine: np.ndarray) -> None:
    """Add :func:`stamps` of images that can be read; a newer one takes the place of the older."""
    if folder is None or not len(fine):
        return
    together = np.concatenate([fine, _read(folder)])
    _, first = np.unique(together[["a", "b"]], return_index=True)
    kept = together[first]
    kept = kept[np.argsort(kept["a"], kind="stable")]
    content = io.BytesIO()
    np.save(content, kept, allow_pickle=False)
    body = content.getbuffer()
    temporary = folder / f"{FILE}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(hashlib.blake2b(body, digest_size=_DIGEST).digest())
            file.write(body)
        os.replace(temporary, folder / FILE)
    except OSError:  # no room: the next run checks again
        temporary.unlink(missing_ok=True)


def _read(folder: Path | None) -> np.ndarray:
    """Everything that is remembered; nothing where the file is not as it was written."""
    try:
        content = (folder / FILE).read_bytes() if folder is not None else b""
        body = memoryview(content)[_DIGEST:]
        if not content or hashlib.blake2b(body, digest_size=_DIGEST).digest() != content[:_DIGEST]:
            return np.zeros(0, _DTYPE)
        found = np.load(io.BytesIO(body), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, _DTYPE)
    return found if found.dtype == _DTYPE and found.ndim == 1 else np.zeros(0, _DTYPE)
