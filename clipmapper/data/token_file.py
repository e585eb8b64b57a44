"""A memory-mapped file of tokens on disk: built in parts, by several processes, resumed when stopped."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from clipmapper.data.content import file_stamp
from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole

TOKENS = "tokens.npy"
KEY = "key.json"
_BUILDING = "tokens.npy.building"
_DONE = "done"  # of each part the digest of its bytes, once it is on disk; zeros before
_VERIFIED = "verified.json"  # the file's size and times when its bytes were last known to be right
_DIGEST = 8  # bytes
_LOOK = 1.0  # seconds between two looks at what other processes have computed
_POLL = 0.2  # seconds between two looks for parts that another process has let go of
_FORMAT = 2


class TokenFile:
    """Tokens [rows, tokens, width] in ``folder/<kind>-<digest of the key>/tokens.npy``.

    ``key``: everything that the tokens depend on, as JSON. Other keys have other files, so tokens of other
    weights, other data or another type are never found; nothing is ever overwritten.

    The rows are computed in parts of ``part_rows``. A part counts once it has been written out; whoever comes
    after an interruption, ``kill -9`` included, computes the parts that are missing. Several processes (those
    of a distributed run, or runs that happen to be started together) share the parts between them: each takes
    one that nobody has a lock on, and all wait for the last. The file has its name only when it is complete.

    A digest of each part is kept. A file whose size or times are not those that it had when it was last known
    to be right (another program changed it, it was copied) is compared with them before it is used.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        key: Mapping,
        rows: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        part_rows: int,
    ) -> None:
        self.dtype, self.shape, self.part_rows = dtype, (rows, *shape), part_rows
        self.key = json.loads(
            json.dumps({**key, "dtype": str(dtype), "shape": self.shape, "format": _FORMAT})
        )
        digest = hashlib.blake2b(json.dumps(self.key, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.root = folder
        self.folder = folder / f"{kind}-{digest}"
        self.parts = [range(s, min(s + part_rows, rows)) for s in range(0, rows, part_rows)]

    def open(self) -> Float[Tensor, "rows tokens width"] | None:
        """The tokens, read from disk as they are asked for; None when the file is not complete.

        Raises ``UserError`` for a file that has been damaged, or put in the place of another.
        """
        path = self.folder / TOKENS
        if not path.exists():
            return None
        try:
            key = json.loads((self.folder / KEY).read_text())
            # Copy on write: torch wants to be able to write, and nothing that is written reaches the file.
            tokens = torch.from_numpy(np.load(path, mmap_mode="c"))
        except Exception as error:  # numpy refuses pickled objects, and stumbles where it happens to
            raise UserError(f"token cache {self.folder}: damaged ({error}); delete this folder") from error
        if key != self.key or tokens.dtype != self.dtype or tuple(tokens.shape) != self.shape:
            raise UserError(f"token cache {self.folder}: holds other tokens than its name says; delete it")
        self._verify(path, tokens)
        return tokens

    def missing_rows(self) -> int:
        """How many are not yet computed."""
        if self._complete():
            return 0
        done = self._done() if (self.folder / _BUILDING).exists() else np.zeros(len(self.parts), bool)
        return sum(len(self.parts[number]) for number in np.flatnonzero(~done))

    def missing_bytes(self) -> int:
        """How much room on the disk they will take."""
        return self.missing_rows() * self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def _verify(self, path: Path, tokens: Tensor) -> None:
        stamp = file_stamp(path)
        try:
            if json.loads((self.folder / _VERIFIED).read_text()) == stamp:
                return
        except (OSError, ValueError, RecursionError):
            pass
        try:
            kept = self._marks()
        except OSError as error:
            raise UserError(f"token cache {self.folder}: damaged ({error}); delete this folder") from error
        for number, part in enumerate(self.parts):
            if kept[number].tobytes() != _digest(tokens[part.start : part.stop]):
                raise UserError(
                    f"token cache {self.folder}: damaged (rows {part.start} to {part.stop - 1} are "
                    "not what was computed); delete this folder"
                )
        self._note_verified(stamp)

    def _note_verified(self, stamp: list[int]) -> None:
        with contextlib.suppress(OSError):  # a folder that may only be read: it is compared every time
            write_whole(self.folder / _VERIFIED, json.dumps(stamp), durable=False)

    def _marks(self) -> np.ndarray:
        """Read each part's digest, a row of bytes."""
        kept = np.frombuffer((self.folder / _DONE).read_bytes(), np.uint8)
        if len(kept) != _DIGEST * len(self.parts):
            raise UserError(f"token cache {self.folder}: damaged ({_DONE} is not whole); delete this folder")
        return kept.reshape(-1, _DIGEST)

    def _done(self) -> np.ndarray:
        """Return, for each part, whether it is on the disk."""
        return self._marks().any(axis=1)

    def build(
        self,
        compute: Callable[[Iterator[range]], Iterator[tuple[range, Float[Tensor, "part tokens width"]]]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Float[Tensor, "rows tokens width"]:
        """Compute what is missing and open the file.

        ``compute``: from ranges of rows, which it may take ahead of what it gives, to their tokens.
        ``progress`` is told of rows, those that others or an earlier build computed included.

        Raises ``UserError`` when the disk is too small or full, or half precision too small for the tokens.
        """
        tokens = self.open()
        if tokens is not None:
            progress(len(tokens))
            return tokens
        begun = False
        try:
            self._prepare()
            begun = True
            self._compute_parts(compute, progress)
            self._finish()
        except OSError as error:
            on = "; the same command goes on from here" if begun else ""
            raise UserError(
                f"token cache {self.folder}: cannot be written ({error.strerror or error}){on}"
            ) from error
        tokens = self.open()
        assert tokens is not None
        return tokens

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "build.lock"):
            if self._complete() or (self.folder / _BUILDING).exists():
                return
            row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
            needed, free = row_bytes * self.shape[0], shutil.disk_usage(self.folder).free
            if needed > free:
                half = "" if self.dtype == torch.float16 else "; training.token_precision=float16 takes half"
                raise UserError(
                    f"token cache {self.folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                    f"free{half}; training.token_cache=false needs none"
                )
            (self.folder / KEY).write_text(json.dumps(self.key, indent=2))
            (self.folder / _DONE).write_bytes(bytes(_DIGEST * len(self.parts)))
            fresh = self.folder / f"{_BUILDING}.new"
            # Of its full size at once, though it takes room on disk only as it is filled.
            np.lib.format.open_memmap(fresh, "w+", self._numpy_dtype, self.shape)
            os.replace(fresh, self.folder / _BUILDING)

    def _compute_parts(self, compute, progress) -> None:
        seen = np.zeros(len(self.parts), bool)
        looked = time.monotonic()

        def look() -> None:
            """All that is done by whomever: as long as the file is long, so only so often."""
            nonlocal looked
            new = self._done() & ~seen
            progress(sum(len(self.parts[number]) for number in np.flatnonzero(new)))
            seen[new] = True
            looked = time.monotonic()

        look()
        with ExitStack() as held:
            try:
                building = held.enter_context(open(self.folder / _BUILDING, "r+b", buffering=0))
            except FileNotFoundError:  # another process has finished the file since it was looked for
                return
            marks = held.enter_context(open(self.folder / _DONE, "r+b", buffering=0))
            locks: dict[int, FileLock] = {}
            held.callback(lambda: [lock.release() for lock in locks.values()])
            while not seen.all():
                for rows, tokens in compute(self._free_parts(seen, locks, marks)):
                    number = rows.start // self.part_rows
                    digest = self._write(building, rows, tokens)
                    os.pwrite(marks.fileno(), digest, _DIGEST * number)
                    self._let_go(locks.pop(number))
                    if not seen[number]:
                        seen[number] = True
                        progress(len(rows))
                    if time.monotonic() - looked > _LOOK:
                        look()
                look()
                if not seen.all():
                    time.sleep(_POLL)

    def _free_parts(self, seen: np.ndarray, locks: dict[int, FileLock], marks: FileIO) -> Iterator[range]:
        """Parts that are not done and that no other process has a lock on, each with its lock taken."""
        for number in np.flatnonzero(~seen).tolist():
            if seen[number]:
                continue
            lock = FileLock(self.folder / f"part-{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if any(os.pread(marks.fileno(), _DIGEST, _DIGEST * number)):  # by another process
                self._let_go(lock)
            else:
                locks[number] = lock
                yield self.parts[number]

    def _let_go(self, lock: FileLock) -> None:
        """Release a finished part and delete its lock: who makes the file anew will find the mark."""
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()

    def _write(self, file: FileIO, rows: range, tokens: Tensor) -> bytes:
        """The digest of what was written."""
        values = tokens.detach().to("cpu", self.dtype)
        if not values.isfinite().all():
            what = "the encoder gives tokens that are not finite: its weights are damaged"
            if tokens.isfinite().all():
                what = "a token exceeds the range of half precision; set training.token_precision=float32"
            raise UserError(f"token cache: {what}")
        if tuple(values.shape) != (len(rows), *self.shape[1:]):
            raise ValueError(f"tokens {tuple(values.shape)} of {len(rows)} rows, expected {self.shape[1:]}")
        content = memoryview(values.contiguous().numpy()).cast("B")
        row_bytes = len(content) // len(rows)
        header = os.fstat(file.fileno()).st_size - row_bytes * self.shape[0]
        file.seek(header + row_bytes * rows.start)
        # Not through the memory map, where a full disk is a bus error.
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())  # before the part is marked as done
        return _digest(values)

    def _finish(self) -> None:
        with FileLock(self.folder / "build.lock"):
            if not self._complete():
                os.replace(self.folder / _BUILDING, self.folder / TOKENS)
                self._note_verified(file_stamp(self.folder / TOKENS))
        for lock in self.folder.glob("part-*.lock"):
            lock.unlink(missing_ok=True)

    def _complete(self) -> bool:
        return (self.folder / TOKENS).exists()

    @property
    def _numpy_dtype(self) -> np.dtype:
        return torch.empty(0, dtype=self.dtype).numpy().dtype


def _digest(values: Tensor) -> bytes:
    content = values.detach().contiguous().numpy()
    digest = hashlib.blake2b(memoryview(content).cast("B"), digest_size=_DIGEST).digest()
    return digest if any(digest) else b"\1" * _DIGEST  # zeros stand for "not done"
