"""Captions of built-in scenes as a data set for captioning."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from clipmapper.data.record import Record
from clipmapper.data.tables.base import RecordList
from clipmapper.data.world.caption_truth import CaptionTruth, caption_truth
from clipmapper.data.world.captions import (
    AlignedCaption,
    aligned_captions,
    caption_words,
    captions,
    describe,
    draw_caption,
)
from clipmapper.data.world.data import World
from clipmapper.data.world.scenes import Scene


@dataclass(frozen=True, slots=True)
class SceneTruth:
    """A scene, of which everything is known: what can be said of it, and whether what is said is so."""

    scene: Scene
    instances: UInt8[np.ndarray, "height width"]

    @property
    def words(self) -> None:
        return None

    def mask(self) -> None:
        return None

    @property
    def has_twins(self) -> bool:
        """Whether two objects look alike: in all but their place."""
        return len({describe(item) for item in self.scene.objects}) < len(self.scene.objects)

    def draw(
        self, rng: random.Random, shares: Mapping[str, float] | None = None, left_to_right: bool = False
    ) -> str:
        """A caption to train on, in a wording of its own each time (see :func:`draw_aligned_caption`)."""
        return draw_caption(self.scene, rng, shares, left_to_right)

    def judge(self, caption: str) -> CaptionTruth:
        """Any caption of the image, held against what is to be seen there."""
        return caption_truth(caption, self.scene)

    def aligned(self, count: int) -> list[AlignedCaption]:
        """So many true captions whose words know what they speak of."""
        return aligned_captions(self.scene, count)


class ScenesCaptions(World):
    """``references``: captions of an image that scores compare with. Otherwise as
    :class:`~clipmapper.data.world.data.World`."""

    def __init__(
        self,
        train_scenes: int,
        simple_scenes: int,
        validation_scenes: int,
        held_out_scenes: int,
        references: int,
        seed: int,
    ) -> None:
        self.references = references
        super().__init__((train_scenes, simple_scenes, validation_scenes, held_out_scenes), seed, None)

    @staticmethod
    def wordings() -> list[str]:
        """Texts with every word that a caption of this data can have, as its first word and as a later one.

        From the grammar and not from drawn captions, which may lack a rare word. (Tokenizers that keep the
        space before a word have other tokens for a first word.)
        """
        return [text for word in caption_words() for text in (word, f"a {word}", f"a, {word}: {word}")]

    def records(self, name: str, scenes: list[Scene]) -> RecordList:
        return RecordList([
            Record(
                id=f"{name}/{number}",
                image=image,
                image_id=f"{name}/{number}",
                captions=tuple(captions(scene, self.references)),
                truth=SceneTruth(scene, instances),
            )
            for number, (scene, image, instances) in enumerate(zip(scenes, *self.rendered(scenes), strict=True))
        ])  # fmt: skip
