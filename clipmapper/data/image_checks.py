"""Opening every image of a data set before training does."""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from clipmapper.data.images import NO_FILE, image_problem
from clipmapper.data.record import Problem, StoredImage, stop_for
from clipmapper.data.tables.columns import Columns, RecordTable, StoredBytes, together
from clipmapper.host.outputs import whole_file
from clipmapper.host.progress import progress

_TOGETHER = 16  # images that a thread is handed at once: of small ones it checks ten thousand a second ...
_WAITING = 8  # ... and how often for each thread, so that Ctrl-C is answered soon
_SAMPLE = 500


def readable_only(
    splits: Mapping[str, RecordTable],
    on_bad_image: str,
    found: Sequence[Problem] = (),
    *,
    check: str = "full",
) -> tuple[dict[str, RecordTable], list[str]]:
    """The splits, and what is to be said of images that can't be read.

    ``on_bad_image``: "error" raises ``UserErrors`` with each of them and with what was ``found`` before, in
    the order of lines; "skip" leaves their records out and says how many. Raises ``UserErrors`` where a split
    is left without records.
    ``check``: "full" reads every image as for the model (:func:`clipmapper.data.images.image_problem`), but
    those that were found readable before and have the same size and time; "sample" 500 of these, drawn by a
    fixed seed; "none" opens none.
    """
    everything = together(list(splits.values()))
    numbers, first = np.unique(everything.images, return_index=True)
    numbers = numbers[np.argsort(first)]  # in the order of lines
    sources = dict(zip(numbers.tolist(), np.sort(first).tolist(), strict=True))
    bad, notes = _bad(everything.columns, numbers, check)
    problems = [Problem(everything[sources[image]].source, *reason) for image, reason in bad.items()]
    if on_bad_image == "error" or found:
        stop_for(sorted([*found, *(problems if on_bad_image == "error" else [])], key=_by_line))
    if not bad:
        return dict(splits), notes
    kept = {name: some.take(~np.isin(some.images, list(bad))) for name, some in splits.items()}
    stop_for([
        Problem(some[0].source.rpartition(":")[0], f"no image of the {name} split can be read")
        for name, some in splits.items() if len(some) and not len(kept[name])
    ])  # fmt: skip
    lost = sum(map(len, splits.values())) - sum(map(len, kept.values()))
    told = "; ".join(str(problem) for problem in problems[:3])
    return kept, [
        *notes,
        f"{len(bad)} unreadable images and their {lost} records are left out, such as {told}",
    ]


def _bad(columns: Columns, images: np.ndarray, check: str) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """Image → (kind of problem, detail) of those that can't be read, and what is to be said."""
    if check == "none":
        return {}, ["images: none was opened before training (data.check=none)"]
    notes = []
    if check == "sample" and len(images) > _SAMPLE:
        chosen = np.sort(np.random.default_rng(0).choice(len(images), _SAMPLE, replace=False))
        notes.append(f"images: {_SAMPLE} of {len(images)} were opened before training (data.check=sample)")
        images = images[chosen]
    home = None if columns.folder is None else columns.folder.parent
    asked = stamps_of(columns, images.tolist())
    unknown = np.flatnonzero(~known(home, asked))
    bad: dict[int, tuple[str, str]] = {}
    fine: list[int] = []
    try:
        for place, reason in zip(unknown.tolist(), _reasons(columns, images[unknown].tolist()), strict=True):
            if reason is None:
                fine.append(place)
            else:
                bad[int(images[place])] = reason
    finally:  # also of a check that was stopped
        remember(home, asked[fine])
    return bad, notes


def _reasons(columns: Columns, images: list[int]) -> Iterator[tuple[str, str] | None]:
    """None or (kind of problem, detail) of every image."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress("checking images", len(images)) as advance,
    ):
        parts = [images[start : start + _TOGETHER] for start in range(0, len(images), _TOGETHER)]
        waiting = _WAITING * (os.cpu_count() or 1)
        for start in range(0, len(parts), waiting):
            for reasons in threads.map(
                lambda part: [_reason(columns.image(i)) for i in part], parts[start : start + waiting]
            ):
                advance(len(reasons))
                yield from reasons


def _reason(image: Path | bytes | StoredImage) -> tuple[str, str] | None:
    try:
        problem = image_problem(image.read() if isinstance(image, StoredImage) else image)
    except Exception as error:  # of a stored image, whatever its library raises
        problem = "", (str(error) or type(error).__name__).splitlines()[0]
    if problem is None:
        return None
    kind, reason = problem
    name = str(image)[:200] if isinstance(image, Path) else "its bytes"
    return (NO_FILE, name) if kind == NO_FILE else ("unreadable image", f"{name} ({reason})")


def _by_line(problem: Problem) -> tuple[str, int]:
    """So that line 9 comes before line 10, and the file as a whole before its lines."""
    parts = re.fullmatch(r"(.*):(?:row )?(\d+)", problem.source)
    return (parts[1], int(parts[2])) if parts else (problem.source, 0)


FILE = "checked_images"
_DTYPE = np.dtype([("a", "<u8"), ("b", "<u8"), ("size", "<i8"), ("mtime", "<i8")])
_DIGEST = 16
_ABSENT = -1


def stamps_of(columns: Columns, images: Sequence[int]) -> np.ndarray:
    """Return the stamp that each image is known by: a digest of its name, the size of its file and when that
    was written (-1 for a file that is not there)."""
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
    # No room: the next run checks again.
    with suppress(OSError), whole_file(folder / FILE, durable=False) as file:
        file.write(hashlib.blake2b(body, digest_size=_DIGEST).digest())
        file.write(body)


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
