# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The settings of writing captions."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from clipmapper.settings.keys import Section, list_problems, setting
from clipmapper.settings.schema import ModelConfig, TrainingConfig


@dataclass
class GPT2Config(Section):
    """A second decoder: ``path`` of a local one with its tokenizer, or null and the sizes of a new one."""

    path: str | None = setting()
    layers: int = setting(minimum=1)
    width: int = setting(minimum=1)
    heads: int = setting(minimum=1)
    frozen: bool = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width % self.heads:
            yield "heads", f"{self.heads} heads do not divide the width of {self.width} evenly"


@dataclass
class CaptionModelConfig(ModelConfig):
    """Stage 2 with a head for words: see :func:`clipmapper.tasks.captioning.build.build_captioner`."""

    task = "captioning"

    tied_head: bool = setting()
    text_embedding_only: bool = setting()
    vocabulary: str = setting(choices=("tokenizer", "data"))
    decoder: str | None = setting(choices=("gpt2_prefix", "gpt2_cross"))
    gpt2: GPT2Config = field(default_factory=GPT2Config)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.decoder is not None and self.tied_head:
            yield "tied_head", f"decoder={self.decoder} has a head of its own, GPT-2's; use tied_head=false"
        if self.decoder is None and self.gpt2.path is not None:
            yield "gpt2.path", "without a decoder it has no effect; give decoder=gpt2_prefix or gpt2_cross"


@dataclass
class CaptionTrainingConfig(TrainingConfig):
    """Settings of training on captions. ``checkpoint``: a captioner to go on from."""

    task = "captioning"
    records = "captions"
    world = False

    objective: str = setting(choices=("cross_entropy", "scst"))
    checkpoint: str | None = setting()
    captions: int = setting(minimum=1)
    label_smoothing: float = setting(minimum=0, below=1)
    scst_captions: int = setting(minimum=1)
    logged_captions: int = setting(minimum=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.objective == "scst" and self.checkpoint is None:
            yield (
                "checkpoint",
                "objective=scst goes on from a captioner that cross_entropy has trained; give its file",
            )


@dataclass
class WordingSharesConfig(Section):
    """How often training draws each wording of a caption, relative to the others."""

    listing: float = setting(minimum=0)
    places: float = setting(minimum=0)
    relations: float = setting(minimum=0)
    counts: float = setting(minimum=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not any(vars(self).values()):
            yield "listing", "at least one wording needs a share above 0"


@dataclass
class ScenesCaptionTrainingConfig(CaptionTrainingConfig):
    """Settings of training on captions of the built-in scenes: an order to learn in."""

    world = True

    simple_share: float = setting(minimum=0, maximum=1)
    first_wordings: list[str] = setting(choices=("listing", "places", "relations", "counts"))
    first_share: float = setting(minimum=0, maximum=1)
    wordings: WordingSharesConfig = field(default_factory=WordingSharesConfig)
    left_to_right: bool = setting()
    twins: float = setting(minimum=0, maximum=1)
    emphasis: float = setting(above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from list_problems("first_wordings", self.first_wordings)
        if self.first_share > self.simple_share:
            yield (
                "first_share",
                f"the first steps see simple scenes: at most simple_share, {self.simple_share}",
            )


SCHEMAS = {
    "caption_model_schema": CaptionModelConfig,
    "caption_training_schema": CaptionTrainingConfig,
    "scenes_caption_training_schema": ScenesCaptionTrainingConfig,
}
