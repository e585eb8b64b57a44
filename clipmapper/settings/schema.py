# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The typed schema of ``conf/``: what every setting is called, its type and its limits.

The values and their reasons are in ``conf/*.yaml``; there is no second set of defaults here, so that each
number can be changed in one place. Groups with several implementations (data, logger, callbacks) have one
class for each, which the group's file names in its defaults list; ``_target_`` in the file is what is built.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from clipmapper.host.outputs import file_name_problem
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import (
    EXPLANATION_SCORES,
    SEED_LIMIT,
    WORD_MAPS,
    Section,
    devices_problems,
    explained_scalars,
    explanation_methods,
    list_problems,
    setting,
)

# As YAML and OmegaConf read them.
_TRUE_FALSE = {True: ("true", "yes", "on", "y", "1"), False: ("false", "no", "off", "n", "0")}


@dataclass
class EncoderConfig(Section):
    """Stage 1. Parameters of :class:`clipmapper.models.encoder.ClipEncoder`."""

    architecture: str = setting()
    pretrained: str | None = setting()
    frozen: bool = setting()
    image_size: int | None = setting(minimum=1)
    trained_blocks: int | None = setting(minimum=1)
    lora_rank: int | None = setting(minimum=1)
    frozen_steps: int = setting(minimum=0)
    learning_rate: float | None = setting(above=0)
    interpolation: list[float] | None = setting(minimum=0, maximum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("trained_blocks", "lora_rank", "learning_rate", "interpolation"):
            if self.frozen and getattr(self, key) is not None:
                yield key, "a frozen encoder trains nothing; give encoder.frozen=false as well, or null"
        if self.frozen and self.frozen_steps:
            yield "frozen_steps", "a frozen encoder is never trained; give encoder.frozen=false as well, or 0"
        if self.interpolation is not None:
            yield from list_problems("interpolation", self.interpolation)


@dataclass
class ModelConfig(Section):
    """Stage 2. Parameters of :class:`clipmapper.models.mapper.Mapper`."""

    task: ClassVar[str | None] = None  # which one it is for, None: any

    mapper: str = setting(choices=("dual_flow", "single_flow"))
    width: int = setting(minimum=1)
    depth: int = setting(minimum=1)
    heads: int = setting(minimum=1)
    mlp_ratio: float = setting(above=0)
    image_position_embedding: bool = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width % self.heads:
            yield "heads", f"{self.heads} heads do not divide the width of {self.width} evenly"


@dataclass
class TrainingConfig(Section):
    """The optimisation, in steps (batches) or in epochs, of which steps are made.

    ``task``: the one that it is for, by its name in :mod:`clipmapper.tasks.registry`. ``records``: what the
    task's records must have, "questions" or "captions". ``world``: whether it is for the built-in world
    (None: for that and for other data).
    """

    task: ClassVar[str]
    records: ClassVar[str]
    world: ClassVar[bool | None] = None

    batch_size: int = setting(minimum=1)
    max_steps: int | None = setting(minimum=1)
    max_epochs: float | None = setting(above=0)
    learning_rate: float = setting(above=0)
    weight_decay: float = setting(minimum=0)
    warmup_steps: int | None = setting(minimum=0)
    warmup_share: float | None = setting(minimum=0, below=1)
    layer_decay: float = setting(above=0, maximum=1)
    token_cache: bool = setting()
    token_cache_folder: str | None = setting()
    token_precision: str = setting(choices=("float16", "float32"))
    token_workers: int = setting(minimum=0)
    validation_samples: int | None = setting(minimum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        for one, other in (("max_steps", "max_epochs"), ("warmup_steps", "warmup_share")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                both = "both" if getattr(self, one) is not None else "neither"
                yield (
                    one,
                    f"{both} of {one} and training.{other} are given; give one of them, null for the other",
                )
        if self.world and self.max_epochs is not None:
            yield "max_epochs", "scenes are drawn for every step, without epochs; give training.max_steps"


@dataclass
class TrainerConfig(Section):
    """Settings of Lightning's ``Trainer``; both intervals are in steps."""

    accelerator: str = setting(choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: str = setting()  # Lightning reads "1" as 1; OmegaConf 2.3 cannot expand a missing `int | str`
    num_nodes: int = setting(minimum=1)
    strategy: str = setting(choices=("ddp", "fsdp2"))
    precision: str = setting(choices=("32-true", "16-mixed", "bf16-mixed"))
    gradient_clip_val: float = setting(minimum=0)
    accumulate_grad_batches: int = setting(minimum=1)
    compile: bool = setting()
    ema_decay: float | None = setting(above=0, below=1)
    val_check_interval: int | None = setting(minimum=1)
    monitor: str | None = setting()
    mode: str | None = setting(choices=("max", "min"))
    patience: int | None = setting(minimum=1)
    checkpoint_interval: int = setting(minimum=1)
    find_batch_size: bool = setting()
    find_learning_rate: bool = setting()
    timeout_minutes: float = setting(above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from devices_problems(self.devices)
        if self.strategy == "fsdp2" and self.ema_decay is not None:
            yield "ema_decay", "sharded weights cannot be averaged; give strategy=ddp, or ema_decay=null"
        for key in ("find_batch_size", "find_learning_rate"):
            if self.strategy == "fsdp2" and getattr(self, key):
                yield (
                    key,
                    "not with sharded weights (strategy=fsdp2); search in one process",
                )
        if self.strategy == "fsdp2" and self.precision == "16-mixed":
            yield "precision", "sharded weights cannot be trained in 16-mixed; give bf16-mixed or 32-true"


@dataclass
class LoggerConfig(Section):
    """Settings that every logger has."""

    _target_: str = setting()


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Arguments of ``lightning.pytorch.loggers.WandbLogger``."""

    project: str = setting()
    mode: str = setting(choices=("offline", "online"))


@dataclass
class CSVLoggerConfig(LoggerConfig):
    """``lightning.pytorch.loggers.CSVLogger`` needs nothing but the folder, which the run gives."""


@dataclass
class TensorBoardLoggerConfig(LoggerConfig):
    """``lightning.pytorch.loggers.TensorBoardLogger`` needs nothing but the folder either."""


@dataclass
class MLflowLoggerConfig(LoggerConfig):
    """Parameters of :class:`clipmapper.training.mlflow_runs.MLflowRun`; the run gives folder and name."""

    experiment_name: str = setting()
    tracking_uri: str | None = setting()


@dataclass
class OtherLoggerConfig(LoggerConfig):
    """Any other logger of Lightning's kind. ``options``: what ``_target_`` is called with, besides the folder
    where it takes one (``save_dir`` or ``root_dir``)."""

    options: dict[str, Any] = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        for key, value in self.options.items():
            if not _is_plain(value):
                yield f"options.{key}", f"{value} can't be written to the run's settings"


@dataclass
class CallbacksConfig(Section):
    """Settings of what happens at validation; itself it stands for nothing (``callbacks=none``)."""

    task: ClassVar[str | None] = None  # which one it is for, None: any


@dataclass
class RelevanceCallbackConfig(CallbacksConfig):
    """Parameters of :class:`clipmapper.training.callback.RelevanceCallback`.

    ``explained`` and ``word_maps`` as of :class:`~clipmapper.settings.commands.PerturbConfig`.
    """

    _target_: str = setting()
    methods: list[str] = setting(choices=explanation_methods)
    scores: list[str] = setting(choices=EXPLANATION_SCORES)
    explained: str | None = setting(choices=explained_scalars)
    word_maps: str | None = setting(choices=WORD_MAPS)
    every_n_validations: int = setting(minimum=1)
    samples: int = setting(minimum=1)
    pictures: int = setting(minimum=0)
    batch_size: int = setting(minimum=1)
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from list_problems("methods", self.methods)
        yield from list_problems("scores", self.scores)
        if self.pictures > self.samples:
            yield "pictures", f"{self.pictures} pictures of {self.samples} samples"


@dataclass
class TrainConfig(Section):
    """``clipmapper train``. A run writes to ``output/name/<start>``; ``callbacks`` may be None."""

    name: str = setting()
    output: str = setting()
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    init: str | None = setting()
    resume: Any = setting(text=True)  # a bool, or the folder of a run: OmegaConf has no such type
    encoder: EncoderConfig = setting()
    model: ModelConfig = setting()
    data: DataConfig = setting()
    training: TrainingConfig = setting()
    trainer: TrainerConfig = setting()
    logger: LoggerConfig = setting()
    callbacks: CallbacksConfig | None = setting()

    def __post_init__(self) -> None:
        if type(self.callbacks) is CallbacksConfig:
            self.callbacks = None
        words = {word: value for value in (True, False) for word in _TRUE_FALSE[value]}
        self.resume = words.get(str(self.resume).lower(), self.resume)

    def problems(self) -> Iterator[tuple[str, str]]:
        if problem := file_name_problem(self.name):
            yield "name", problem
        if not isinstance(self.resume, bool) and not Path(str(self.resume)).is_dir():
            yield "resume", f"{self.resume!r} is not true, not false and not a run's folder"
        task = self.training.task
        if self.trainer.ema_decay is not None and self.encoder.lora_rank is not None:
            yield "trainer.ema_decay", "averages adapters' factors, not their product; give ema_decay=null"
        if self.trainer.strategy == "fsdp2" and self.callbacks is not None:
            yield (
                "callbacks",
                "sharded weights cannot be explained while training; give callbacks=none, and explain the "
                "checkpoint with clipmapper perturb",
            )
        if self.trainer.strategy == "fsdp2" and self.encoder.lora_rank is not None:
            yield "trainer.strategy", "fsdp2 does not shard adapters (encoder.lora_rank); give strategy=ddp"
        if self.training.records not in self.data.records:
            yield (
                "data",
                f"the one that is chosen has {' or '.join(self.data.records)}, but training is for {task} "
                f"and needs {self.training.records}; an experiment (experiment=vqa_scenes, "
                "experiment=caption_scenes) chooses what belongs together",
            )
        for key in ("model", "callbacks"):
            section = getattr(self, key)
            if section is not None and section.task and section.task != task:
                yield (
                    key,
                    f"the one that is chosen is for {section.task}, but training is for {task}; "
                    "an experiment (experiment=vqa_scenes, experiment=caption_scenes) chooses what belongs "
                    "together",
                )
        if self.data.streamed and getattr(self.training, "balance", "none") != "none":
            yield "training.balance", "answers of a stream (data=shards) can't be counted; give none"
        if self.data.streamed and getattr(self.training, "questions_per_image", 1) > 1:
            yield "training.questions_per_image", "a stream (data=shards) has an order of its own; give 1"
        if self.data.streamed and self.training.token_cache:
            yield "training.token_cache", "a stream (data=shards) has no end to cache; give false"
        if self.training.world is not None and self.training.world != self.data.world:
            which = f"{task}_scenes" if self.data.world else task
            yield "training", f"not the one for these data; choose training={which}"


def _is_plain(value: Any) -> bool:
    """Whether JSON and YAML have it: numbers that are finite, text, and lists and dictionaries of them."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and isfinite(value))
