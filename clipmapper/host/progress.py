"""How far long work is: a bar on a terminal, otherwise a line a minute, as logs can take it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tqdm import tqdm

LINE_SECONDS = 60.0
_FEW = 64  # of counted items the clock is read once for as many


class ProgressLines:
    """Says at most once a minute how much of some work is done, how fast, and how long the rest will take.

    ``total``: None if unknown. ``done``: what an earlier run did. So is what is told of within the first
    second, which is there already: it has no pace.
    """

    def __init__(self, what: str, total: int | None, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.began = self.said = time.monotonic()
        self._first: int | None = None

    def advance(self, count: int = 1) -> None:
        self.to(self.done + count)

    def to(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            all_at_once = now - self.began < 1 and done != self.total
            self._first = done if all_at_once else self.done
        self.done = done
        if now - self.said >= LINE_SECONDS:
            self.said = now
            print(self.line(now - self.began), flush=True)  # a log should not be minutes behind

    def line(self, seconds: float) -> str:
        """How it stands after so many seconds."""
        paced = self.done - (self._first or 0)
        rate = paced / seconds
        speed = f"{rate:,.{0 if rate >= 10 else 2}f} a second"
        if self.total is None:
            return f"{self.what}: {self.done:,} ({speed})"
        left = f", about {span(seconds * (self.total - self.done) / paced)} left" if paced else ""
        share = 100 * self.done / max(self.total, 1)
        return f"{self.what}: {self.done:,} of {self.total:,} ({share:.0f} %), {speed}{left}"


@contextmanager
def progress(what: str, total: int | None = None, *, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more are done. The bar of a terminal goes away at the end.

    ``hidden``: nothing is shown, as in processes beside the main one.
    """
    if hidden:
        yield lambda done: None
        return
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


def span(seconds: int | float) -> str:
    """A duration in the unit that people would say it in."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def print_on_own_line(text: str, *, ends: bool = False) -> None:
    """``ends``: nothing goes on behind it: bars, which leave the cursor at their end, are closed.

    Otherwise they are taken away for the line and drawn again below it.
    """
    sys.stdout.flush()
    if ends:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)
