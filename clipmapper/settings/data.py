# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The settings of data sets. ``_target_`` in a file of ``conf/data`` is what is built with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from clipmapper.settings.keys import SEED_LIMIT, Section, list_problems, setting

_SCENES = 1_000_000  # of a split: 7 GB of pixels


@dataclass
class DataConfig(Section):
    """Settings that every data set has.

    ``choice``: what ``data=`` is for it; a checkpoint tells by it which data it was trained on.
    ``records``: what its records may have. ``world``: whether it is the built-in world, which is drawn from
    numbers. ``streamed``: whether training records come as a stream without end.
    """

    choice: ClassVar[str | None] = None
    records: ClassVar[tuple[str, ...]] = ("questions", "captions")
    world: ClassVar[bool] = False
    streamed: ClassVar[bool] = False

    _target_: str = setting()
    augment: str = setting(choices=("none", "crop", "colour", "randaugment"))


@dataclass
class ScenesVQAConfig(DataConfig):
    """Parameters of :class:`clipmapper.data.world.data.ScenesVQA`."""

    choice = "scenes"
    records = ("questions",)
    world = True

    train_scenes: int = setting(minimum=1, maximum=_SCENES)
    simple_scenes: int = setting(minimum=1, maximum=_SCENES)
    validation_scenes: int = setting(minimum=1, maximum=_SCENES)
    held_out_scenes: int = setting(minimum=1, maximum=_SCENES)
    train_questions: int = setting(minimum=1, maximum=1000)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class ScenesCaptionsConfig(DataConfig):
    """Parameters of :class:`clipmapper.data.world.data.ScenesCaptions`."""

    choice = "scenes_captions"
    records = ("captions",)
    world = True

    train_scenes: int = setting(minimum=1, maximum=_SCENES)
    simple_scenes: int = setting(minimum=1, maximum=_SCENES)
    validation_scenes: int = setting(minimum=1, maximum=_SCENES)
    held_out_scenes: int = setting(minimum=1, maximum=_SCENES)
    references: int = setting(minimum=1, maximum=10)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class RecordDataConfig(DataConfig):
    """Settings of data sets of records (:class:`clipmapper.data.records.RecordData`)."""

    on_bad_image: str = setting(choices=("error", "skip"))
    decoding: str = setting(choices=("fast", "exact"))
    check: str = setting(choices=("full", "sample", "none"))
    workers: int = setting(minimum=0)


@dataclass
class AnswersConfig(RecordDataConfig):
    """Settings of data sets of questions: :func:`clipmapper.data.answers.answer_vocabulary`."""

    least_answers: int = setting(minimum=1)
    targets: str = setting(choices=("soft", "thirds", "three"))
    accuracy: str = setting(choices=("vqa", "a_okvqa"))


@dataclass
class SplitsConfig(RecordDataConfig):
    """How splits are made where there are none: :func:`clipmapper.data.tables.whole.split_by_image`."""

    validation_share: float = setting(above=0, below=1)
    split_seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class FoldsConfig(SplitsConfig):
    """How data without enough for validation are validated in parts
    (:func:`clipmapper.data.tables.whole.fold_by_image`)."""

    folds: int | None = setting(minimum=2)
    fold: int | None = setting(minimum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            yield (
                "fold",
                f"{self.fold} is none of the parts that data.folds={self.folds} says".replace("None", "null"),
            )


@dataclass
class ManifestConfig(FoldsConfig, AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.manifest.manifest_data`."""

    choice = "manifest"

    path: str = setting()
    validation_path: str | None = setting()
    test_path: str | None = setting()
    images: str | None = setting()


@dataclass
class HuggingFaceConfig(FoldsConfig, AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.huggingface.huggingface_data`."""

    choice = "huggingface"

    path: str = setting()


@dataclass
class VQAv2Config(AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.vqa_v2.vqa_v2_data`."""

    choice = "vqa_v2"
    records = ("questions",)

    folder: str = setting()
    train: list[str] = setting(choices=("train2014", "val2014"))
    validation: str = setting(choices=("train2014", "val2014"))
    test: str | None = setting(choices=("test2015", "test-dev2015"))

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from list_problems("train", self.train)


@dataclass
class CocoCaptionsConfig(RecordDataConfig):
    """Parameters of :func:`clipmapper.data.readers.caption_files.coco_captions_data`."""

    choice = "coco_captions"
    records = ("captions",)

    folder: str = setting()
    karpathy: str | None = setting()


@dataclass
class FlickrCaptionsConfig(SplitsConfig):
    """Parameters of :func:`clipmapper.data.readers.caption_files.flickr_captions_data`."""

    choice = "flickr30k"
    records = ("captions",)

    tokens: str = setting()
    images: str = setting()
    split_files: str | None = setting()


@dataclass
class Flickr8kConfig(FlickrCaptionsConfig):
    """The same of Flickr8k, whose name checkpoints tell."""

    choice = "flickr8k"


@dataclass
class ShardsConfig(SplitsConfig, AnswersConfig):
    """Parameters of :class:`clipmapper.data.shards.data.ShardData`."""

    choice = "shards"
    streamed = True

    path: str = setting()
    validation_path: str | None = setting()
    buffer: int = setting(minimum=1)
