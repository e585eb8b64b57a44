"""Texts that are longer than a context: said for each, or, within a run, once with their number."""

import hashlib
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_PLACES = 2**23  # of a bit each: 100,000 different texts are counted to half a per cent


class CutTexts:
    """Counts different texts, in all processes that are forked while it is there.

    A text has one of 2²³ places by its digest; what is counted is places.
    """

    def __init__(self, aloud: bool = True) -> None:
        self.aloud = aloud
        shared = multiprocessing.get_context("fork")
        self._marks = shared.RawArray("B", _PLACES // 8)
        self._count = shared.Value("q", 0)

    @property
    def count(self) -> int:
        return self._count.value

    def add(self, text: str) -> bool:
        """Whether it is the first of all."""
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        byte, bit = divmod(int.from_bytes(digest, "big") % _PLACES, 8)
        with self._count.get_lock():
            if self._marks[byte] >> bit & 1:
                return False
            self._marks[byte] |= 1 << bit
            self._count.value += 1
            return self._count.value == 1


_counting: CutTexts | None = None


@contextmanager
def cut_texts_said_once(aloud: bool = True) -> Iterator[CutTexts]:
    """Within the block the first text that is cut is said, with an example, and at its end how many were.

    ``aloud``: False for all processes of several but one, which would say the same.
    """
    global _counting
    before, counted = _counting, CutTexts(aloud)
    _counting = counted
    try:
        yield counted
    finally:
        _counting = before
        if aloud and counted.count > 1:
            warnings.warn(f"{counted.count} different texts were longer than the context", stacklevel=3)


def warn_of_cut(kind: str, text: str, tokens: int, room: int) -> None:
    """Say that the end of a text (``kind``: "text", "caption") is not read."""
    what = f"{kind} of {tokens} tokens is cut to the {room} that the context has room for: {text[:60]!r}..."
    if _counting is None:
        warnings.warn(what, stacklevel=3)
    elif _counting.add(text) and _counting.aloud:
        warnings.warn(f"{what} (others are counted, and not said one by one)", stacklevel=3)
