"""Tokens of a frozen encoder, computed once: in memory, or in a file that later runs find again."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmapper.data.token_file import TokenFile
from clipmapper.errors import UserError

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}

Progress = Callable[[int], None]
Load = Callable[[Sequence[int]], Any]
Encode = Callable[[Any], Float[Tensor, "part tokens width"]]


@dataclass(frozen=True)
class TokenStore:
    """Where tokens are kept, and how.

    Attributes
    ----------
    folder : of the files (:class:`~clipmapper.data.token_file.TokenFile`); None: in memory, for this run.
    precision : "float16" or "float32".
    workers : processes that read and decode what is encoded, 0 for none.
    batch_size : rows that are encoded at once.
    processes : how many on this machine keep the same tokens in memory, each for itself.
    sources : what was looked at before anything is encoded, by split, so that it is not looked at twice.
    identities : of the one encoder that the store is for (:meth:`once`).
    """

    folder: Path | None = None
    precision: str = "float16"
    workers: int = 0
    batch_size: int = 256
    processes: int = 1
    sources: dict[str, Any] = field(default_factory=dict, compare=False)
    identities: dict[str, Mapping] = field(default_factory=dict, compare=False)

    def check_room(self, shapes: Mapping[str, tuple[int, int, int]], files: Sequence[TokenFile] = ()) -> None:
        """Raise ``UserError`` where tokens have no room, in memory or on the disk.

        ``shapes``: kind → (rows, tokens, width). ``files``: all that are to be there, for a store with a
        folder; what is in them already needs no more room.
        """
        needed = self.bytes_of(shapes)
        what = " and ".join(f"{shape[0]:,} {kind}" for kind, shape in shapes.items())
        if self.folder is not None:
            needed, there = sum(file.missing_bytes() for file in files), free_bytes(self.folder)
            if needed > there:
                half = "" if self.precision == "float16" else "; training.token_precision=float16 takes half"
                raise UserError(
                    f"training.token_cache_folder={self.folder}: tokens of {what} take "
                    f"{size_of(needed)} more, {size_of(there)} are free"
                    f"{half}; training.token_cache=false needs none"
                )
            return
        there = available_memory()
        if self.processes * needed <= there:
            return
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        raise UserError(
            f"training.token_cache: tokens of {what}{each} take "
            f"{size_of(self.processes * needed)} of memory, {size_of(there)} are free; give "
            "training.token_cache_folder, which keeps them in files, or training.token_cache=false, which "
            "computes them in every step"
        )

    def once(self, what: str, make: Callable[[], Mapping]) -> Mapping:
        """Call ``make`` the first time only and return what it gave: to read all weights takes seconds."""
        if what not in self.identities:
            self.identities[what] = make()
        return self.identities[what]

    def bytes_of(self, shapes: Mapping[str, tuple[int, int, int]]) -> int:
        """Return the size of tokens of these shapes, (rows, tokens, width)."""
        return PRECISIONS[self.precision].itemsize * sum(map(prod, shapes.values()))

    def file(self, kind: str, key: Mapping, rows: int, shape: tuple[int, int]) -> TokenFile:
        """Return the file in which :meth:`tokens` keeps them. Only for a store with a folder."""
        assert self.folder is not None
        return TokenFile(self.folder, kind, key, rows, shape, PRECISIONS[self.precision], self.batch_size)

    @torch.no_grad()
    def tokens(
        self,
        kind: str,
        key: Callable[[], Mapping],
        rows: int,
        shape: tuple[int, int],
        load: Load,
        encode: Encode,
        progress: Progress = lambda done: None,
    ) -> Float[Tensor, "rows tokens width"]:
        """Tokens of every row.

        ``kind``: a word for the file's name. ``key``: what the tokens depend on, as JSON (asked for only
        where there is a file). ``shape``: (tokens, width) of a row. ``load(rows)``: what is encoded of some
        rows; it runs in the workers. ``encode`` runs here. ``progress`` is told how many rows were added.

        Raises ``UserError`` for tokens that are to be in memory and have no room there.
        """
        dtype = PRECISIONS[self.precision]

        def compute(parts: Iterable[range]) -> Iterator[tuple[range, Tensor]]:
            for part, loaded in self._loaded(load, parts):
                yield part, encode(loaded)

        if self.folder is not None:
            return self.file(kind, key(), rows, shape).build(compute, progress)
        self.check_room({kind: (rows, *shape)})
        tokens = torch.empty(rows, *shape, dtype=dtype)
        size = self.batch_size
        for part, values in compute(range(s, min(s + size, rows)) for s in range(0, rows, size)):
            tokens[part.start : part.stop] = values
            progress(len(part))
        return tokens

    def _loaded(self, load: Load, parts: Iterable[range]) -> Iterable[tuple[range, Any]]:
        if self.workers == 0:
            return ((part, load(part)) for part in parts)
        return DataLoader(
            _Loading(load), batch_size=None, sampler=parts, num_workers=self.workers, collate_fn=_as_it_is
        )


def _as_it_is(loaded: tuple[range, Any]) -> tuple[range, Any]:
    """torch's own way would make a list of the range."""
    return loaded


class _Loading(Dataset):
    """Gives, in a worker, a part and what ``load`` makes of it."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def __getitem__(self, part: range) -> tuple[range, Any]:
        return part, self.load(part)


@dataclass(frozen=True)
class TextTokens:
    """Tokens of every different text. ``text_of``: the text of every question."""

    tokens: Float[Tensor, "texts tokens width"]
    lengths: Int[Tensor, "texts"]
    text_of: Int[Tensor, "questions"]

    def texts(self, questions: Int[Tensor, "batch"]) -> dict[str, Tensor]:
        """``text_tokens`` and ``text_valid`` of some questions, cut to the longest of them."""
        texts = self.text_of[questions]
        lengths = self.lengths[texts]
        longest = int(lengths.max())
        valid = torch.arange(longest) < lengths[:, None]
        return {"text_tokens": self.tokens[texts, :longest].float(), "text_valid": valid}


@dataclass(frozen=True)
class TokenCache(TextTokens):
    """Image tokens of every image as well. ``image_of``: the image of every question."""

    image_tokens: Float[Tensor, "images image_tokens image_width"]
    image_of: Int[Tensor, "questions"]

    def images(self, questions: Int[Tensor, "batch"]) -> Float[Tensor, "batch image_tokens image_width"]:
        """Image tokens of some questions."""
        return self.image_tokens[self.image_of[questions]].float()


_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup/memory.max")  # "max" or a number of bytes (cgroups version 2)


def available_memory() -> int:
    """Bytes that programs on this machine can still take without swapping.

    In a container no more than it may have; where the system doesn't say what is left: all that there is.
    """
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _text(_MACHINE).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            left = int(value.split()[0]) * 1024
    limit = _text(_CONTAINER).strip()
    return min(left, int(limit)) if limit.isdigit() else left


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk on which a folder is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(count: int) -> str:
    """A number of bytes in the unit that people would say it in."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
