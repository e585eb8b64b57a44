"""Captions of built-in scenes as a data set for captioning."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8

from clipmapper.data.world.caption_truth import CaptionTruth, caption_truth
from clipmapper.data.world.captions import caption_words, captions, describe, draw_caption
from clipmapper.data.world.scenes import MAX_OBJECTS, Scene, draw_scene, render_all


@dataclass(frozen=True)
class CaptionSplit:
    """Images, and several captions of each, which scores compare with.

    ``scenes`` and ``instances`` hold the truth about what is where, for data that knows it.
    """

    images: UInt8[np.ndarray, "images height width 3"]
    references: Sequence[Sequence[str]]
    scenes: Sequence[Scene]
    instances: UInt8[np.ndarray, "images height width"]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, places: np.ndarray) -> "CaptionSplit":
        """The images at these places."""
        references, scenes = ([one[p] for p in places.tolist()] for one in (self.references, self.scenes))
        return CaptionSplit(self.images[places], references, scenes, self.instances[places])

    @cached_property
    def with_twins(self) -> list[int]:
        """Numbers of the images in which two objects look alike: in all but their place."""
        return [
            number
            for number, scene in enumerate(self.scenes)
            if len({describe(item) for item in scene.objects}) < len(scene.objects)
        ]

    def draw(
        self,
        image: int,
        rng: random.Random,
        shares: Mapping[str, float] | None = None,
        left_to_right: bool = False,
    ) -> str:
        """A caption to train on, in a wording of its own each time (see :func:`draw_aligned_caption`)."""
        return draw_caption(self.scenes[image], rng, shares, left_to_right)

    def truth(self, image: int, caption: str) -> CaptionTruth:
        """Any caption of that image, held against what is to be seen there."""
        return caption_truth(caption, self.scenes[image])


class ScenesCaptions:
    """The splits of the built-in world, with captions. Splits never share a scene.

    Parameters: number of scenes of each split. ``simple_scenes`` have one or two objects and are for the
    first part of training. ``held_out_scenes`` are about colour–shape combinations that
    training never sees. ``references``: captions of an image that scores compare with.
    """

    def __init__(
        self,
        train_scenes: int,
        simple_scenes: int,
        validation_scenes: int,
        held_out_scenes: int,
        references: int,
        seed: int,
    ) -> None:
        self.sizes = {
            "train": train_scenes,
            "simple": simple_scenes,
            "validation": validation_scenes,
            "held_out": held_out_scenes,
        }
        self.references = references
        self.seed = seed

    @cached_property
    def train(self) -> CaptionSplit:
        return self._split("train")

    @cached_property
    def simple(self) -> CaptionSplit:
        return self._split("simple")

    @cached_property
    def validation(self) -> CaptionSplit:
        return self._split("validation")

    @cached_property
    def held_out(self) -> CaptionSplit:
        return self._split("held_out")

    @staticmethod
    def wordings() -> list[str]:
        """Texts with every word that a caption of this data can have, as its first word and as a later one.

        From the grammar and not from drawn captions, which may lack a rare word. (Tokenizers that keep the
        space before a word have other tokens for a first word.)
        """
        return [text for word in caption_words() for text in (word, f"a {word}", f"a, {word}: {word}")]

    def _split(self, name: str) -> CaptionSplit:
        held_out = name == "held_out"
        objects = (1, 2) if name == "simple" else (1, MAX_OBJECTS)
        scenes = [
            draw_scene(self.seed, name, index, objects=objects, held_out=held_out)
            for index in range(self.sizes[name])
        ]
        images, instances = render_all(scenes)
        return CaptionSplit(images, [captions(scene, self.references) for scene in scenes], scenes, instances)
