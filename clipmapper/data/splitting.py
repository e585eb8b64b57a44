"""Splits by image, so that no image is both trained and validated on."""

import hashlib
from collections.abc import Sequence

from clipmapper.data.records import Record


def split_by_image(
    records: Sequence[Record], validation_share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, validation). Which side an image is on depends on its id and the seed alone, so it stays there
    when images are added; at least one image is on either side where there are two.

    ``validation_share``: of the images, about.
    """
    places = {record.image_id: _place(record.image_id, seed) for record in records}
    ordered = sorted(places, key=lambda image: (places[image], image))
    held = {image for image in ordered if places[image] < validation_share} or set(ordered[:1])
    if len(held) == len(ordered) > 1:
        held.discard(ordered[-1])
    return (
        [record for record in records if record.image_id not in held],
        [record for record in records if record.image_id in held],
    )


def _place(image: str, seed: int) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
