# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The settings of answering questions."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from clipmapper.settings.keys import Section, list_problems, setting
from clipmapper.settings.schema import ModelConfig, TrainingConfig


@dataclass
class VQAModelConfig(ModelConfig):
    """Stage 2 with a head for answers."""

    task = "vqa"

    head_width: int = setting(minimum=1)


@dataclass
class FamilySharesConfig(Section):
    """How often training asks each family of questions, relative to the others."""

    colour: float = setting(minimum=0)
    shape: float = setting(minimum=0)
    existence: float = setting(minimum=0)
    counting: float = setting(minimum=0)
    place: float = setting(minimum=0)
    size: float = setting(minimum=0)
    relation_choose: float = setting(minimum=0)
    relation_open: float = setting(minimum=0)
    relation_yes_no: float = setting(minimum=0)
    comparison: float = setting(minimum=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not any(vars(self).values()):
            yield "colour", "at least one family needs a share above 0"


@dataclass
class VQATrainingConfig(TrainingConfig):
    """Settings of training on questions. ``balance``: "answers" asks for every answer equally often.
    ``questions_per_image``: so many about an image come in one batch, which encodes it once."""

    task = "vqa"
    records = "questions"
    world = False

    blind_steps: int = setting(minimum=0)
    balance: str = setting(choices=("none", "answers"))
    questions_per_image: int = setting(minimum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.world and self.balance != "none":
            yield "balance", "how often a family of the built-in world is asked is said by training.shares"
        if self.questions_per_image > 1 and (self.world or self.balance != "none"):
            why = "of the built-in world" if self.world else "for every answer (training.balance=answers)"
            yield "questions_per_image", f"questions {why} are drawn one by one; give 1"


@dataclass
class ScenesVQATrainingConfig(VQATrainingConfig):
    """Settings of training on questions about the built-in scenes: an order to learn them in."""

    world = True

    simple_share: float = setting(minimum=0, maximum=1)
    first_families: list[str] = setting()
    first_share: float = setting(minimum=0, maximum=1)
    shares: FamilySharesConfig = field(default_factory=FamilySharesConfig)
    told_by_size: float = setting(minimum=0, maximum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from list_problems("first_families", self.first_families)


SCHEMAS = {
    "vqa_model_schema": VQAModelConfig,
    "vqa_training_schema": VQATrainingConfig,
    "scenes_vqa_training_schema": ScenesVQATrainingConfig,
}
