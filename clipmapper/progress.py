"""How far long work is: a bar on a terminal, otherwise a line a minute, as logs can take it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 60.0  # seconds between two lines
_FEW = 64  # the clock is read once for as many


class ProgressLines:
    """Says at most once a minute how much of some work is done, and how fast. ``total``: None if unknown."""

    def __init__(self, what: str, total: int | None, done: int = 0) -> None:
        self.what, self.total = what, total
        self.done = self._first = done
        self._began = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.to(self.done + count)

    def to(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """How it stands after so many seconds."""
        of = "" if self.total is None else f" of {self.total:,}"
        rate = (self.done - self._first) / seconds
        return f"{self.what}: {self.done:,}{of} ({rate:,.{0 if rate >= 10 else 2}f} a second)"


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more are done. The bar of a terminal goes away at the end."""
    if not sys.stdout.isatty():
        yield ProgressLines(what, total).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def counted(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The same items, with progress told."""
    with progress(what, total) as advance:
        waiting = 0
        for item in items:
            yield item
            waiting += 1
            if waiting == _FEW:
                advance(waiting)
                waiting = 0
