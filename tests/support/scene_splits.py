"""The records of a split of the built-in world in arrays, to be compared as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipmapper.data.world.data import World
from clipmapper.data.world.questions import SceneQuestion
from clipmapper.data.world.scenes import Scene


@dataclass(frozen=True)
class Questions:
    images: np.ndarray
    instances: np.ndarray
    image_of: np.ndarray
    questions: Sequence[SceneQuestion]
    masks: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.questions)

    def mask(self, number: int) -> np.ndarray:
        return self.masks[number]


def questions(data: World, name: str) -> Questions:
    """Every record agrees with its question."""
    records = data.split(name)
    first, image_of = records.first_of_images()
    first = first.tolist()
    for record in records:
        asked = record.truth.question
        assert (record.question, record.family) == (asked.text, asked.family)
        assert record.answers == (asked.answer,) * 10 and record.truth.words == asked.deciding_words
    return Questions(
        np.stack([records[n].image.pixels for n in first]),
        np.stack([records[n].truth.instances for n in first]),
        image_of,
        [record.truth.question for record in records],
        [record.truth.mask() for record in records],
    )


@dataclass(frozen=True)
class Captions:
    images: np.ndarray
    references: Sequence[Sequence[str]]
    scenes: Sequence[Scene]
    instances: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def captions(data: World, name: str) -> Captions:
    records = data.split(name)
    return Captions(
        np.stack([record.image.pixels for record in records]),
        [list(record.captions) for record in records],
        [record.truth.scene for record in records],
        np.stack([record.truth.instances for record in records]),
    )
