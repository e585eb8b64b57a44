"""Splits by image, so that no image is both trained and validated on."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from clipmapper.data.record import Record
from clipmapper.data.record_table import RecordTable
from clipmapper.data.table_builder import as_table


def split_by_image(
    records: Sequence[Record], validation_share: float, seed: int
) -> tuple[RecordTable, RecordTable]:
    """(train, validation). Which side an image is on depends on its id and the seed alone, so it stays there
    when images are added; at least one image is on either side where there are two.

    ``validation_share``: of the images, about.
    """
    table = as_table(records)
    numbers, image = np.unique(table.images, return_inverse=True)
    ids = (table.columns.image_id(number) for number in numbers.tolist())
    places = np.fromiter((_place(one, seed) for one in ids), float, len(numbers))
    held = places < validation_share
    if len(numbers) and not held.any():
        held[_outermost(table, numbers, places, min)] = True
    if len(numbers) > 1 and held.all():
        held[_outermost(table, numbers, places, max)] = False
    return table.take(~held[image]), table.take(held[image])


def _outermost(table: RecordTable, numbers: np.ndarray, places: np.ndarray, end: Callable) -> int:
    """The image with the least or the largest place, of equal ones by its id."""
    alike = np.flatnonzero(places == end(places)).tolist()
    return end(alike, key=lambda one: table.columns.image_id(int(numbers[one])))


def _place(image: str, seed: int) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
