"""Checks of a table of records as a whole."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipmapper.data.record import Problem, Record
from clipmapper.data.tables.builder import FinishedTable, TableBuilder, as_table, splits_of
from clipmapper.data.tables.columns import BYTES_FILE, TABLES, Columns, RecordTable
from clipmapper.data.tables.remembered import Found

_APART = "images"  # a folder in the table's, while images and their captions are put together


def table_of_whole(lines: FinishedTable, problems: Sequence[Problem], notes: Sequence[str] = ()) -> Found:
    """The records of lines, without those whose id another has; of captions one record for each image of a
    split, with all of its captions. ``problems``: those of single lines, to which others are added."""
    splits, doubles = lines.without_doubles()
    problems = [*problems, *doubles, *_mixed(splits), *_partly_split(splits), *_families_of_captions(splits)]
    columns = lines.columns
    if not problems and columns.count and columns.question(0) is None:
        columns = _captions_together(columns, splits)
        splits = splits_of(columns, lines.split_names)
    return Found(columns, splits, problems, notes)


def shared_images(splits: Mapping[str, RecordTable]) -> list[str]:
    """Say how many images of other splits are in train too, a line for each split that has some."""
    images = {name: np.unique(some.images) for name, some in splits.items()}
    found = []
    for name in ("validation", "test"):
        shared = len(np.intersect1d(images.get(name, ()), images["train"]))
        if shared:
            found.append(f"{name}: {shared} of its {len(images[name])} images are in train too")
    return found


def _mixed(splits: Mapping[str | None, RecordTable]) -> list[Problem]:
    """Questions among captions, or captions among questions: whichever are fewer."""
    bare = {name: some.bare() for name, some in splits.items()}
    told = {name: (some.lengths("captions") > 0) | bare[name] for name, some in splits.items()}
    captions = sum(int(flags.sum()) for flags in told.values())
    questions = sum(map(len, splits.values())) - captions
    if not captions or not questions:
        return []
    first_told = next(bool(flags[0]) for flags in told.values() if len(flags))
    # Of as many, those that come first are the usual ones.
    odd_told = captions < questions if captions != questions else not first_told
    odd, usual = ("captions", "a question") if odd_told else ("a question", "captions")
    what = f"{odd} here, {usual} on {max(captions, questions)} other lines"
    problems = []
    for name, some in splits.items():
        for place in np.flatnonzero(told[name] == odd_told).tolist():
            source = some.columns.source(int(some.rows[place]))
            if bare[name][place]:
                problems.append(Problem(source, "no question and no captions", "other lines ask questions"))
            else:
                problems.append(Problem(source, "questions and captions in one data set", what))
    return problems


def _partly_split(splits: Mapping[str | None, RecordTable]) -> list[Problem]:
    if len(splits) < 2 or None not in splits:
        return []
    some = splits[None]
    return [
        Problem(some.columns.source(row), "no split", "other lines have one") for row in some.rows.tolist()
    ]


def _families_of_captions(splits: Mapping[str | None, RecordTable]) -> list[Problem]:
    """Check that an image is in one family of a split, however many lines its captions have."""
    found = []
    for some in splits.values():
        families, (first, image) = some.families, some.first_of_images()
        other = (families != families[first][image]) & (some.lengths("captions") > 0)
        for place in np.flatnonzero(other).tolist():
            known = some[int(first[image[place]])]
            record = some[place]
            what = f"{record.family!r}, but {known.family!r} on {known.source}"
            found.append(Problem(record.source, "another family than the image's", what))
    return found


def _captions_together(columns: Columns, splits: Mapping[str | None, RecordTable]) -> Columns:
    """One record for each image of a split, with all of its captions."""
    grouped = {name: some.first_of_images() for name, some in splits.items()}
    if all(len(first) == len(image) for first, image in grouped.values()):
        return columns
    folder = columns.folder
    if folder is not None:
        folder = folder / _APART
        folder.mkdir()
    table = TableBuilder(folder)
    for name, some in splits.items():
        first, image = grouped[name]
        places = np.argsort(image, kind="stable").tolist()
        ends = np.searchsorted(np.sort(image), np.arange(len(first)), side="right").tolist()
        start = 0
        for end in ends:
            group = [some[place] for place in places[start:end]]
            captions = tuple(caption for record in group for caption in record.captions)
            table.add(name, replace(group[0], captions=captions))
            start = end
    return _moved_up(table.finish().columns)


def _moved_up(columns: Columns) -> Columns:
    """The columns of a folder in the folder above, in place of those there."""
    if columns.folder is None:
        return columns
    home: Path = columns.folder.parent
    (home / BYTES_FILE).unlink(missing_ok=True)
    for file in [*TABLES, *([BYTES_FILE] if (columns.folder / BYTES_FILE).exists() else [])]:
        (columns.folder / file).replace(home / file)
    columns.folder.rmdir()
    return Columns.mapped(home, columns.objects)


def split_by_image(
    records: Sequence[Record], validation_share: float, seed: int, folder: Path | None = None
) -> tuple[RecordTable, RecordTable]:
    """(train, validation). Which side an image is on depends on its id and the seed alone, so it stays there
    when images are added; at least one image is on either side where there are two.

    ``validation_share``: of the images, about. ``folder``: what the data say that images lie in; the id of an
    image file is its path from there, so that data that were moved, or whose path is written in another way,
    have the same splits.
    """
    table = as_table(records)
    ids, image = _images(table, folder)
    places = np.fromiter((_place(one, seed) for one in ids), float, len(ids))
    held = places < validation_share
    if len(ids) and not held.any():
        held[_outermost(ids, places, min)] = True
    if len(ids) > 1 and held.all():
        held[_outermost(ids, places, max)] = False
    return table.take(~held[image]), table.take(held[image])


def fold_by_image(
    records: Sequence[Record], fold: int, folds: int, seed: int, folder: Path | None = None
) -> tuple[RecordTable, RecordTable]:
    """(train, validation), of which the latter is part ``fold``, from 1 on, of ``folds``.

    Every image is in one part, whose numbers of images differ by one at most. ``folder``: as of
    :func:`split_by_image`.
    """
    table = as_table(records)
    ids, image = _images(table, folder)
    drawn = sorted(range(len(ids)), key=lambda one: (_place(ids[one], seed), ids[one]))
    held = np.zeros(len(ids), bool)
    held[drawn[fold - 1 :: folds]] = True
    return table.take(~held[image]), table.take(held[image])


def _images(table: RecordTable, folder: Path | None) -> tuple[list[str], np.ndarray]:
    """The ids of the images, and which of them each record has."""
    numbers, image = np.unique(table.images, return_inverse=True)
    return [_moved(table.columns, number, folder) for number in numbers.tolist()], image


def _moved(columns: Columns, image: int, folder: Path | None) -> str:
    one = columns.image_id(image)
    if folder is None or not columns.is_file(image):
        return one
    inside = one.removeprefix(os.path.join(folder, ""))
    return inside if inside != one else os.path.relpath(one, folder)


def _outermost(ids: Sequence[str], places: np.ndarray, end: Callable) -> int:
    """The image with the least or the largest place, of equal ones by its id."""
    return end(np.flatnonzero(places == end(places)).tolist(), key=lambda one: ids[one])


def _place(image: str, seed: int) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
