"""Questions about built-in scenes as a data set for visual question answering."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, UInt8

from clipmapper.data.world.questions import ANSWERS, CHANCE, FAMILIES, SceneQuestion, balanced_questions
from clipmapper.data.world.scenes import MAX_OBJECTS, draw_scene, render_all


@dataclass(frozen=True)
class VQASplit:
    """Images and the questions about them; ``image_of`` gives the image of every question.

    ``masks`` and ``deciding_words`` hold the truth about what decides each answer, for data that knows it.
    """

    images: UInt8[np.ndarray, "images height width 3"]
    questions: Sequence[SceneQuestion]
    image_of: np.ndarray
    instances: UInt8[np.ndarray, "images height width"]

    def __len__(self) -> int:
        return len(self.questions)

    def family_counts(self) -> dict[str, int]:
        """How many questions of each family there are."""
        return dict(Counter(question.family for question in self.questions))

    def take(self, places: np.ndarray) -> "VQASplit":
        """The questions at these places, with all images."""
        asked = [self.questions[place] for place in places.tolist()]
        return replace(self, questions=asked, image_of=self.image_of[places])

    def mask(self, question: int) -> Bool[np.ndarray, "height width"]:
        """The visible pixels of the objects that decide the answer."""
        deciding = [k + 1 for k in self.questions[question].deciding_objects]
        return np.isin(self.instances[self.image_of[question]], deciding)


class ScenesVQA:
    """The splits of the built-in world. Splits never share a scene, and every split is balanced.

    Parameters: number of scenes of each split. ``simple_scenes`` have one or two objects and are for the
    first part of training; ``held_out_scenes`` are about colour–shape combinations that training never sees.
    ``train_questions``: how many of a family at most about one scene that is trained on (elsewhere one). What
    differs between two questions about the same scene ("is A left or right of B", and of B and A) is only
    their words, so they can't be learnt by heart from the image.
    """

    answers = ANSWERS
    families = FAMILIES
    chance = CHANCE

    def __init__(
        self,
        train_scenes: int,
        simple_scenes: int,
        validation_scenes: int,
        held_out_scenes: int,
        train_questions: int,
        seed: int,
    ) -> None:
        self.train_questions = train_questions
        self.sizes = {
            "train": train_scenes,
            "simple": simple_scenes,
            "validation": validation_scenes,
            "held_out": held_out_scenes,
        }
        self.seed = seed

    @cached_property
    def train(self) -> VQASplit:
        return self._split("train")

    @cached_property
    def simple(self) -> VQASplit:
        return self._split("simple")

    @cached_property
    def validation(self) -> VQASplit:
        return self._split("validation")

    @cached_property
    def held_out(self) -> VQASplit:
        return self._split("held_out")

    def _split(self, name: str) -> VQASplit:
        held_out = name == "held_out"
        objects = (1, 2) if name == "simple" else (1, MAX_OBJECTS)
        scenes = [
            draw_scene(self.seed, name, i, objects=objects, held_out=held_out)
            for i in range(self.sizes[name])
        ]
        per_family = self.train_questions if name in ("train", "simple") else 1
        asked = list(
            balanced_questions(scenes, self.seed, per_family=per_family, held_out=held_out, most=objects[1])
        )
        image_of = np.repeat(np.arange(len(scenes)), [len(a) for a in asked])
        images, instances = render_all(scenes)
        return VQASplit(images, [q for questions in asked for q in questions], image_of, instances)
