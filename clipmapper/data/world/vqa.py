"""Questions about built-in scenes as a data set for visual question answering."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.record import Record
from clipmapper.data.tables.base import RecordList
from clipmapper.data.world.data import World
from clipmapper.data.world.questions import ANSWERS, CHANCE, FAMILIES, SceneQuestion, balanced_questions
from clipmapper.data.world.scenes import MAX_OBJECTS, Scene

_PEOPLE = 10  # annotators who agree: the official accuracy is then 1 or 0


@dataclass(frozen=True, slots=True)
class QuestionTruth:
    """The objects and the words that decide the answer to a question about a scene."""

    question: SceneQuestion
    instances: UInt8[np.ndarray, "height width"]

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
    ) -> None:
        self.train_questions = train_questions
        sizes = (train_scenes, simple_scenes, validation_scenes, held_out_scenes)
        super().__init__(sizes, seed, AnswerVocabulary(ANSWERS))

    def records(self, name: str, scenes: list[Scene]) -> RecordList:
        asked = balanced_questions(
            scenes,
            self.seed,
            per_family=self.train_questions if name in ("train", "simple") else 1,
            held_out=name == "held_out",
            most=2 if name == "simple" else MAX_OBJECTS,
        )
        records: list[Record] = []
        for number, (questions, image, instances) in enumerate(
            zip(asked, *self.rendered(scenes), strict=True)
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
                        truth=QuestionTruth(question, instances),
                    )
                )
        return RecordList(records)
