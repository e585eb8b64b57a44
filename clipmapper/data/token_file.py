"""A memory-mapped file of tokens on disk: built in parts, by several processes, resumed when stopped."""

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

from clipmapper.errors import UserError

TOKENS = "tokens.npy"
KEY = "key.json"
_BUILDING = "tokens.npy.building"
_DONE = "done"  # one byte a part, 1 when the part is on disk
_POLL = 0.2  # seconds between two looks at the parts that other processes are computing


class TokenFile:
    """Tokens [rows, tokens, width] in ``folder/<kind>-<digest of the key>/tokens.npy``.

    ``key``: everything that the tokens depend on, as JSON. Other keys have other files, so tokens of other
    weights, other data or another type are never found; nothing is ever overwritten.

    The rows are computed in parts of ``part_rows``. A part counts once it has been written out; whoever comes
    after an interruption, ``kill -9`` included, computes the parts that are missing. Several processes (those
    of a distributed run, or runs that happen to be started together) share the parts between them: each takes
    one that nobody has a lock on, and all wait for the last. The file has its name only when it is complete.
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
        self.key = json.loads(json.dumps({**key, "dtype": str(dtype), "shape": self.shape}))
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
        return tokens

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
        try:
            self._prepare()
            self._compute_parts(compute, progress)
            self._finish()
        except OSError as error:
            raise UserError(
                f"token cache {self.folder}: cannot be written ({error}); the same command goes on from here"
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
            (self.folder / _DONE).write_bytes(bytes(len(self.parts)))
            fresh = self.folder / f"{_BUILDING}.new"
            # Of its full size at once, though it takes room on disk only as it is filled.
            np.lib.format.open_memmap(fresh, "w+", self._numpy_dtype, self.shape)
            os.replace(fresh, self.folder / _BUILDING)

    def _compute_parts(self, compute, progress) -> None:
        seen: set[int] = set()

        def look() -> None:
            done = {number for number, byte in enumerate((self.folder / _DONE).read_bytes()) if byte}
            progress(sum(len(self.parts[number]) for number in done - seen))
            seen.update(done)

        look()
        with ExitStack() as held:
            try:
                building = held.enter_context(open(self.folder / _BUILDING, "r+b", buffering=0))
            except FileNotFoundError:  # another process has finished the file since it was looked for
                return
            marks = held.enter_context(open(self.folder / _DONE, "r+b", buffering=0))
            locks: dict[int, FileLock] = {}
            held.callback(lambda: [lock.release() for lock in locks.values()])
            while len(seen) < len(self.parts):
                for rows, tokens in compute(self._free_parts(seen, locks)):
                    number = rows.start // self.part_rows
                    self._write(building, rows, tokens)
                    marks.seek(number)
                    marks.write(b"\1")
                    locks.pop(number).release()
                    look()
                look()
                if len(seen) < len(self.parts):
                    time.sleep(_POLL)

    def _free_parts(self, seen: set[int], locks: dict[int, FileLock]) -> Iterator[range]:
        """Parts that are not done and that no other process has a lock on, each with its lock taken."""
        for number in [n for n in range(len(self.parts)) if n not in seen]:
            lock = FileLock(self.folder / f"part-{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            locks[number] = lock
            if (self.folder / _DONE).read_bytes()[number]:  # by another process, since it was looked for
                locks.pop(number).release()
            else:
                yield self.parts[number]

    def _write(self, file: FileIO, rows: range, tokens: Tensor) -> None:
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

    def _finish(self) -> None:
        with FileLock(self.folder / "build.lock"):
            if not self._complete():
                os.replace(self.folder / _BUILDING, self.folder / TOKENS)
        for lock in self.folder.glob("part-*.lock"):
            lock.unlink(missing_ok=True)

    def _complete(self) -> bool:
        return (self.folder / TOKENS).exists()

    @property
    def _numpy_dtype(self) -> np.dtype:
        return torch.empty(0, dtype=self.dtype).numpy().dtype
