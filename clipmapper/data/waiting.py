"""Telling how far something long has come: a bar on a terminal, a line a minute in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

LINE_SECONDS = 60.0


@contextmanager
def waiting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Inside, the function that it gives is told how many of ``total`` were done.

    On a terminal there is a bar, which goes away at the end. Elsewhere a line is printed a minute, none of
    what takes less than one: how many are done, and how long the rest will take at the pace so far (of what
    was done in this call: rows that an earlier run had computed are told in one go and have no pace).
    """
    console = Console(emoji=False, highlight=False)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)
        return
    lines = _Lines(what, total)
    yield lines.advance


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.said = time.monotonic()
        self.first: int | None = None  # what was there before anything took time

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done if now - self.began < 1 and done < self.total else 0
        self.done += done
        if now - self.said < LINE_SECONDS:
            return
        self.said = now
        paced = self.done - self.first
        left = (
            "" if not paced else f", about {span((now - self.began) * (self.total - self.done) / paced)} left"
        )
        share = 100 * self.done / max(self.total, 1)
        # Flushed: what a log holds should not be minutes behind.
        print(f"{self.what}: {self.done:,} of {self.total:,} ({share:.0f} %){left}", flush=True)


def span(seconds: int | float) -> str:
    """A duration in the unit that people would say it in."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
