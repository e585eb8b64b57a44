"""Opening every image of a data set before training does."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from clipmapper.data.images import NO_FILE, image_problem
from clipmapper.data.problems import Problem, stop_for
from clipmapper.data.records import Record, StoredImage

_WAITING = 4096  # images handed to the threads at a time, so that Ctrl-C is answered soon


def readable_only(
    splits: dict[str, list[Record]], on_bad_image: str, found: Sequence[Problem] = ()
) -> tuple[dict[str, list[Record]], list[str]]:
    """The splits, and what is to be said of images that can't be read.

    ``on_bad_image``: "error" raises ``UserErrors`` with each of them and with what was ``found`` before, in
    the order of lines; "skip" leaves their records out and says how many. Raises ``UserErrors`` where a split
    is left without records.
    Every image is read as for the model (:func:`clipmapper.data.images.image_problem`).
    """
    records = {record.image_id: record for name in splits for record in reversed(splits[name])}
    bad = {image: reason for image, reason in _reasons(records) if reason}
    problems = [Problem(records[image].source, *reason) for image, reason in bad.items()]
    if on_bad_image == "error" or found:
        stop_for(sorted([*found, *(problems if on_bad_image == "error" else [])], key=_by_line))
    kept = {name: [record for record in some if record.image_id not in bad] for name, some in splits.items()}
    stop_for([
        Problem(some[0].source.rpartition(":")[0], f"no image of the {name} split can be read")
        for name, some in splits.items() if some and not kept[name]
    ])  # fmt: skip
    if not bad:
        return kept, []
    lost = sum(map(len, splits.values())) - sum(map(len, kept.values()))
    first = "; ".join(str(problem) for problem in problems[:3])
    return kept, [f"{len(bad)} unreadable images and their {lost} records are left out, such as {first}"]


def _reasons(records: dict[str, Record]):
    """(image, None or (kind of problem, detail)) of every image."""
    images = list(records)
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        Progress(transient=True, disable=len(images) < 500) as progress,
    ):
        task = progress.add_task("checking images", total=len(images))
        for start in range(0, len(images), _WAITING):
            some = images[start : start + _WAITING]
            for image, reason in zip(some, threads.map(lambda i: _reason(records[i]), some), strict=True):
                progress.advance(task)
                yield image, reason


def _reason(record: Record) -> tuple[str, str] | None:
    image = record.image
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
