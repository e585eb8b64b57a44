"""Digests of data's content, by which a cache tells whether it was made from this data."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clipmapper.host.outputs import write_whole

INDEX = "file_digests.json"


def content_digest(content: bytes | np.ndarray) -> str:
    """Return a digest of bytes, or of an array together with its type and shape."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.dtype} {content.shape};".encode())
        content = np.ascontiguousarray(content)
    digest.update(content)
    return digest.hexdigest()


def joint_digest(digests: Iterable[str]) -> str:
    """One digest of many, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for one in digests:
        digest.update(one.encode() + b";")
    return digest.hexdigest()


def file_digests(
    paths: Sequence[Path], index: Path, *, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Digests of files' content, each file read only if it is not as it was when it was read before.

    ``index``: the folder in which the digests are kept. Whether a file is as it was is judged as git does: by
    size, inode and the times of the last change of content and of inode, the last of which no program can
    set back. A copy of the data elsewhere is read again, and has the same digests.

    Raises ``OSError`` for a file that cannot be read.
    """
    file = index / INDEX
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):  # absent or damaged: everything is read
        known = {}
    known = known if isinstance(known, dict) else {}
    kept = {}

    def of(path: Path) -> str:
        stamp = file_stamp(path)
        name = os.path.abspath(path)
        before = known.get(name)
        digest = before[1] if _is_entry(before) and before[0] == stamp else _read(path)
        kept[name] = [stamp, digest]
        progress(1)
        return digest

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(of, paths))
    if any(known.get(name) != entry for name, entry in kept.items()):
        with contextlib.suppress(OSError):  # where it can't be kept, they are read again the next time
            index.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known | kept), durable=False)
    return digests


def file_stamp(path: Path) -> list[int]:
    """Size, inode and the times of the last change of content and of inode."""
    found = os.stat(path)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _is_entry(known: object) -> bool:
    return isinstance(known, list) and len(known) == 2 and isinstance(known[1], str)
