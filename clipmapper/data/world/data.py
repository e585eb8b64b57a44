"""The built-in world as a data set: its splits are drawn and rendered when they are first asked for."""

import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.images import clip_input
from clipmapper.data.record import Record
from clipmapper.data.records import RecordData
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
from clipmapper.data.world.questions import ANSWERS, CHANCE, FAMILIES, SceneQuestion, balanced_questions
from clipmapper.data.world.scenes import MAX_OBJECTS, Scene, draw_scene, render, render_all


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """A :class:`~clipmapper.data.record.StoredImage` of a scene."""

    pixels: UInt8[np.ndarray, "height width 3"]

    def read(self) -> Image.Image:
        return Image.fromarray(self.pixels)


class RenderedReader:
    """Rendered images as ``visual`` (an ``open_clip`` image tower) reads them, normalised: so small that many
    at once are little to move."""

    fast = False

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual

    def __call__(self, record: Record) -> Float[Tensor, "3 height width"]:
        return self.many([record])[0]

    def many(self, records: Sequence[Record]) -> Float[Tensor, "records 3 height width"]:
        return clip_input(np.stack([record.image.pixels for record in records]), self.visual)


class World(RecordData):
    """Splits of the built-in world never share a scene.

    Parameters: ``sizes``, numbers of scenes of each split (train, simple, validation, held_out). "simple" has
    scenes of one or two objects and is for the first part of training; "held_out" is about colour-shape
    combinations that training never sees. ``augment``: how images of training are altered, one of
    :data:`clipmapper.data.augment.AUGMENT`.
    """

    validation_splits = ("validation", "held_out")
    labelled_at_most = 500
    drawn_anew = True

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        seed: int,
        vocabulary: AnswerVocabulary | None,
        augment: str,
    ) -> None:
        super().__init__({}, vocabulary, augment=augment)
        self.seed = seed
        self.sizes = dict(zip(("train", "simple", "validation", "held_out"), sizes, strict=True))
        self.splits = _Drawn(self.sizes, self._drawn)

    @abstractmethod
    def records(self, name: str, scenes: list[Scene]) -> RecordList:
        """The records of a split."""

    def rendered(
        self, scenes: list[Scene]
    ) -> tuple[list[RenderedImage], Sequence[UInt8[np.ndarray, "height width"]]]:
        """The images, and which object is seen at each of their pixels (0: none)."""
        images, instances = render_all(scenes)
        return [RenderedImage(image) for image in images], list(instances)

    def reader(self, encoder: nn.Module) -> RenderedReader:
        return RenderedReader(encoder.clip.visual)

    def summary(self) -> Iterator[str]:
        """The scenes are rendered here."""
        began, images = time.monotonic(), sum(self.sizes.values())
        for name in self.sizes:
            _ = self.splits[name]
        seconds = time.monotonic() - began
        yield f"{images} scenes rendered in {seconds:.0f} s ({images / seconds:.0f} images/s)"

    def _drawn(self, name: str) -> RecordList:
        objects = (1, 2) if name == "simple" else (1, MAX_OBJECTS)
        scenes = [
            draw_scene(self.seed, name, index, objects=objects, held_out=name == "held_out")
            for index in range(self.sizes[name])
        ]
        return self.records(name, scenes)


class _Drawn(Mapping[str, RecordList]):
    def __init__(self, names: Mapping[str, int], draw: Callable[[str], RecordList]) -> None:
        self.names, self.draw, self.found = names, draw, {}

    def __getitem__(self, name: str) -> RecordList:
        if name not in self.names:
            raise KeyError(name)
        if name not in self.found:
            self.found[name] = self.draw(name)
        return self.found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


_PEOPLE = 10  # annotators who agree: the official accuracy is then 1 or 0


def _background(scene: Scene) -> RenderedImage:
    return RenderedImage(render([scene], empty=True).images[0])


@dataclass(frozen=True, slots=True)
class QuestionTruth:
    """The objects and the words that decide the answer to a question about a scene."""

    question: SceneQuestion
    instances: UInt8[np.ndarray, "height width"]
    scene: Scene

    @property
    def words(self) -> tuple[str, ...]:
        return self.question.deciding_words

    @property
    def told_by_size(self) -> bool:
        """Whether only its size tells the object that is asked about from another."""
        return self.question.told_by_size

    def mask(self) -> Bool[np.ndarray, "height width"]:
        """The visible pixels of the objects that decide."""
        return np.isin(self.instances, [k + 1 for k in self.question.deciding_objects])

    def background(self) -> RenderedImage:
        """The picture without its objects."""
        return _background(self.scene)


class ScenesVQA(World):
    """Every split is balanced. Parameters besides those of :class:`~clipmapper.data.world.data.World`:

    ``train_questions``: how many of a family at most about one scene that is trained on (elsewhere one). What
    differs between two questions about the same scene ("is A left or right of B", and of B and A) is only
    their words, so they can't be learnt by heart from the image.
    """

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
        augment: str = "none",
    ) -> None:
        self.train_questions = train_questions
        sizes = (train_scenes, simple_scenes, validation_scenes, held_out_scenes)
        super().__init__(sizes, seed, AnswerVocabulary(ANSWERS), augment)

    def records(self, name: str, scenes: list[Scene]) -> RecordList:
        asked = balanced_questions(
            scenes,
            self.seed,
            per_family=self.train_questions if name in ("train", "simple") else 1,
            held_out=name == "held_out",
            most=2 if name == "simple" else MAX_OBJECTS,
        )
        records: list[Record] = []
        for number, (scene, questions, image, instances) in enumerate(
            zip(scenes, asked, *self.rendered(scenes), strict=True)
        ):
            for question in questions:
                records.append(
                    Record(
                        id=f"{name}/{len(records)}",
                        image=image,
                        image_id=f"{name}/{number}",
                        question=question.text,
                        answers=(question.answer,) * _PEOPLE,
                        family=question.family,
                        truth=QuestionTruth(question, instances, scene),
                    )
                )
        return RecordList(records)


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

    def background(self) -> RenderedImage:
        """The picture without its objects."""
        return _background(self.scene)

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
        augment: str = "none",
    ) -> None:
        self.references = references
        sizes = (train_scenes, simple_scenes, validation_scenes, held_out_scenes)
        super().__init__(sizes, seed, None, augment)

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
            ) for number, (scene, image, instances) in enumerate(zip(scenes, *self.rendered(scenes),
            strict=True))
        ])  # fmt: skip
