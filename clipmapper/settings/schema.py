# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The typed schema of ``conf/``: what every setting is called, its type and its limits.

The values and their reasons are in ``conf/*.yaml``; there is no second set of defaults here, so that each
number can be changed in one place. Groups with several implementations (data, logger, callbacks) have one
class for each, which the group's file names in its defaults list; ``_target_`` in the file is what is built.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from clipmapper.host.outputs import file_name_problem

# What is compared unless told otherwise: in the pictures and tables of a run, and by `explain compare=true`.
COMPARED_METHODS = (
    "weighted",
    "weighted_token",
    "weighted_half",
    "gae",
    "rollout",
    "raw_attention",
    "grad_cam",
    "random",
)
# The names of clipmapper.relevance.METHODS (a test compares them), known here without importing torch.
METHODS = (
    *COMPARED_METHODS,
    "weighted_norm",
    "weighted_token_norm",
    "attention_flow",
    "effective_attention",
    "effective_rollout",
    "effective_weighted",
    "efficient_attention",
    "efficient_rollout",
    "efficient_weighted",
    "grad_eclip",
    "legrad",
    "beyond_intuition",
    "token_tm",
    "alti",
    "transformer_attribution",
    "partial_lrp",
    "attn_lrp",
    "integrated_gradients",
    "occlusion",
    "input_x_gradient",
    "weighted_libra",
    "weighted_token_libra",
    "weighted_norm_libra",
    "weighted_token_norm_libra",
    "effective_weighted_libra",
    "efficient_weighted_libra",
    "gae_libra",
    "grad_cam_libra",
    "grad_eclip_libra",
    "input_x_gradient_libra",
    "token_tm_libra",
    "beyond_intuition_libra",
    "legrad_libra",
    "transformer_attribution_libra",
    "integrated_gradients_libra",
)
# As clipmapper.tasks.captioning.perturbation.ALL_SCORES (a test compares them).
CAPTION_SCORES = (
    "log_probability",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "cider",
    "meteor",
    "spice",
)
SEED_LIMIT = 2**32 - 1  # numpy's legacy generator, which Lightning seeds as well, takes no more
_SCENES = 1_000_000  # of a split: 7 GB of pixels


# As YAML and OmegaConf read them.
_TRUE_FALSE = {True: ("true", "yes", "on", "y", "1"), False: ("false", "no", "off", "n", "0")}


def setting(**limits: Any) -> Any:
    """A field whose value comes from YAML or the command line.

    ``limits``: ``minimum``, ``maximum`` (allowed themselves), ``above``, ``below`` (not allowed themselves);
    ``choices`` of a string or of a list's entries. Choices are strings rather than an ``Enum`` because they
    end up in JSON, in W&B and in checkpoints that are loaded without unpickling classes. ``text``: free
    text, not empty, taken from the command line as it is, without Hydra's grammar (commas, brackets, ``=``).
    """
    return field(default=MISSING, metadata=limits)


class Section:
    """A group of settings."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it), for rules that one setting's limits cannot say."""
        yield from ()


@dataclass
class EncoderConfig(Section):
    """Stage 1. Parameters of :class:`clipmapper.models.encoder.ClipEncoder`."""

    architecture: str = setting(text=True)
    pretrained: str | None = setting(text=True)
    frozen: bool = setting()
    image_size: int | None = setting(minimum=1)
    trained_blocks: int | None = setting(minimum=1)
    lora_rank: int | None = setting(minimum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("trained_blocks", "lora_rank"):
            if self.frozen and getattr(self, key) is not None:
                yield key, "a frozen encoder trains nothing; give encoder.frozen=false as well, or null"


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
class VQAModelConfig(ModelConfig):
    """Stage 2 with a head for answers."""

    task = "vqa"

    head_width: int = setting(minimum=1)


@dataclass
class GPT2Config(Section):
    """A second decoder: ``path`` of a local one with its tokenizer, or null and the sizes of a new one."""

    path: str | None = setting(text=True)
    layers: int = setting(minimum=1)
    width: int = setting(minimum=1)
    heads: int = setting(minimum=1)
    frozen: bool = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width % self.heads:
            yield "heads", f"{self.heads} heads do not divide the width of {self.width} evenly"


@dataclass
class CaptionModelConfig(ModelConfig):
    """Stage 2 with a head for words: see :func:`clipmapper.models.build.build_captioner`."""

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
class DataConfig(Section):
    """What every data set has.

    ``choices``: what ``data=`` may be for it. A checkpoint tells by them which data it was trained on.
    """

    task: ClassVar[str | None] = None  # which one it is for, None: any
    choices: ClassVar[tuple[str, ...]] = ()

    _target_: str = setting()


@dataclass
class ScenesVQAConfig(DataConfig):
    """Parameters of :class:`clipmapper.data.world.vqa.ScenesVQA`."""

    task = "vqa"
    choices = ("scenes",)

    train_scenes: int = setting(minimum=1, maximum=_SCENES)
    simple_scenes: int = setting(minimum=1, maximum=_SCENES)
    validation_scenes: int = setting(minimum=1, maximum=_SCENES)
    held_out_scenes: int = setting(minimum=1, maximum=_SCENES)
    train_questions: int = setting(minimum=1, maximum=1000)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class ScenesCaptionsConfig(DataConfig):
    """Parameters of :class:`clipmapper.data.world.captioning.ScenesCaptions`."""

    task = "captioning"
    choices = ("scenes_captions",)

    train_scenes: int = setting(minimum=1, maximum=_SCENES)
    simple_scenes: int = setting(minimum=1, maximum=_SCENES)
    validation_scenes: int = setting(minimum=1, maximum=_SCENES)
    held_out_scenes: int = setting(minimum=1, maximum=_SCENES)
    references: int = setting(minimum=1, maximum=10)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class RecordDataConfig(DataConfig):
    """What data sets of records have (:class:`clipmapper.data.records.RecordData`)."""

    on_bad_image: str = setting(choices=("error", "skip"))
    decoding: str = setting(choices=("fast", "exact"))
    check: str = setting(choices=("full", "sample", "none"))
    workers: int = setting(minimum=0)


@dataclass
class AnswersConfig(RecordDataConfig):
    """What data sets of questions have besides: :func:`clipmapper.data.answers.answer_vocabulary`."""

    least_answers: int = setting(minimum=1)
    targets: str = setting(choices=("soft", "thirds", "three"))
    accuracy: str = setting(choices=("vqa", "a_okvqa"))


@dataclass
class SplitsConfig(RecordDataConfig):
    """How splits are made where there are none: :func:`clipmapper.data.tables.whole.split_by_image`."""

    validation_share: float = setting(above=0, below=1)
    split_seed: int = setting(minimum=0, maximum=SEED_LIMIT)


@dataclass
class ManifestConfig(SplitsConfig, AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.manifest.manifest_data`."""

    choices = ("manifest",)

    path: str = setting(text=True)
    validation_path: str | None = setting(text=True)
    test_path: str | None = setting(text=True)
    images: str | None = setting(text=True)


@dataclass
class HuggingFaceConfig(SplitsConfig, AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.huggingface.huggingface_data`."""

    choices = ("huggingface",)

    path: str = setting(text=True)


@dataclass
class VQAv2Config(AnswersConfig):
    """Parameters of :func:`clipmapper.data.readers.vqa_v2.vqa_v2_data`."""

    task = "vqa"
    choices = ("vqa_v2",)

    folder: str = setting(text=True)
    train: list[str] = setting(choices=("train2014", "val2014"))
    validation: str = setting(choices=("train2014", "val2014"))
    test: str | None = setting(choices=("test2015", "test-dev2015"))

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _list_problems("train", self.train)


@dataclass
class CocoCaptionsConfig(RecordDataConfig):
    """Parameters of :func:`clipmapper.data.readers.coco_captions.coco_captions_data`."""

    task = "captioning"
    choices = ("coco_captions",)

    folder: str = setting(text=True)
    karpathy: str | None = setting(text=True)


@dataclass
class FlickrCaptionsConfig(SplitsConfig):
    """Parameters of :func:`clipmapper.data.readers.flickr_captions.flickr_captions_data`."""

    task = "captioning"
    choices = ("flickr30k", "flickr8k")

    tokens: str = setting(text=True)
    images: str = setting(text=True)
    split_files: str | None = setting(text=True)


@dataclass
class ShardsConfig(SplitsConfig, AnswersConfig):
    """Parameters of :class:`clipmapper.data.shards.data.ShardData`."""

    choices = ("shards",)

    path: str = setting(text=True)
    validation_path: str | None = setting(text=True)
    buffer: int = setting(minimum=1)


@dataclass
class TrainingConfig(Section):
    """The optimisation, in steps (batches). ``_target_``: the task, a class that is called with all this."""

    task: ClassVar[str | None] = None  # which one it is for, None: any

    _target_: str = setting()
    batch_size: int = setting(minimum=1)
    max_steps: int = setting(minimum=1)
    learning_rate: float = setting(above=0)
    weight_decay: float = setting(minimum=0)
    warmup_steps: int = setting(minimum=0)
    layer_decay: float = setting(above=0, maximum=1)
    token_cache: bool = setting()
    token_cache_folder: str | None = setting(text=True)
    token_precision: str = setting(choices=("float16", "float32"))
    token_workers: int = setting(minimum=0)
    validation_samples: int | None = setting(minimum=1)


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
    """What training on questions has besides."""

    task = "vqa"

    blind_steps: int = setting(minimum=0)


@dataclass
class ScenesVQATrainingConfig(VQATrainingConfig):
    """What training on questions about the built-in scenes has besides: an order to learn them in."""

    simple_share: float = setting(minimum=0, maximum=1)
    first_families: list[str] = setting()
    first_share: float = setting(minimum=0, maximum=1)
    shares: FamilySharesConfig = field(default_factory=FamilySharesConfig)
    told_by_size: float = setting(minimum=0, maximum=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _list_problems("first_families", self.first_families)


@dataclass
class CaptionTrainingConfig(TrainingConfig):
    """What training on captions has besides. ``checkpoint``: a captioner to go on from."""

    task = "captioning"

    objective: str = setting(choices=("cross_entropy", "scst"))
    checkpoint: str | None = setting(text=True)
    captions: int = setting(minimum=1)
    label_smoothing: float = setting(minimum=0, below=1)
    scst_captions: int = setting(minimum=1)
    logged_captions: int = setting(minimum=0)

    def problems(self) -> Iterator[tuple[str, str]]:
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
    """What training on captions of the built-in scenes has besides: an order to learn in."""

    simple_share: float = setting(minimum=0, maximum=1)
    first_wordings: list[str] = setting(choices=("listing", "places", "relations", "counts"))
    first_share: float = setting(minimum=0, maximum=1)
    wordings: WordingSharesConfig = field(default_factory=WordingSharesConfig)
    left_to_right: bool = setting()
    twins: float = setting(minimum=0, maximum=1)
    emphasis: float = setting(above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from _list_problems("first_wordings", self.first_wordings)
        if self.first_share > self.simple_share:
            yield (
                "first_share",
                f"the first steps see simple scenes: at most simple_share, {self.simple_share}",
            )


@dataclass
class TrainerConfig(Section):
    """What of Lightning's ``Trainer`` can be set; both intervals are in steps."""

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
    checkpoint_interval: int = setting(minimum=1)
    timeout_minutes: float = setting(above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+", self.devices):
            yield "devices", f"{self.devices!r} is not a number of devices (1, 2 …), a list as '0,1', or auto"
        if self.strategy == "fsdp2" and self.ema_decay is not None:
            yield "ema_decay", "sharded weights cannot be averaged; give strategy=ddp, or ema_decay=null"
        if self.strategy == "fsdp2" and self.precision == "16-mixed":
            yield "precision", "sharded weights cannot be trained in 16-mixed; give bf16-mixed or 32-true"


@dataclass
class LoggerConfig(Section):
    """What every logger has."""

    _target_: str = setting()


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Arguments of ``lightning.pytorch.loggers.WandbLogger``."""

    project: str = setting(text=True)
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

    experiment_name: str = setting(text=True)
    tracking_uri: str | None = setting(text=True)


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
    """What happens at validation; itself it stands for nothing (``callbacks=none``)."""

    task: ClassVar[str | None] = None  # which one it is for, None: any


@dataclass
class RelevanceCallbackConfig(CallbacksConfig):
    """Parameters of :class:`clipmapper.training.callback.RelevanceCallback`."""

    _target_: str = setting()
    methods: list[str] = setting(choices=METHODS)
    every_n_validations: int = setting(minimum=1)
    samples: int = setting(minimum=1)
    pictures: int = setting(minimum=0)
    batch_size: int = setting(minimum=1)
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _list_problems("methods", self.methods)
        if self.pictures > self.samples:
            yield "pictures", f"{self.pictures} pictures of {self.samples} samples"


@dataclass
class TrainConfig(Section):
    """``clipmapper train``. A run writes to ``output/name/<start>``; ``callbacks`` may be None."""

    name: str = setting(text=True)
    output: str = setting(text=True)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
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
        for key in ("model", "data", "callbacks"):
            section = getattr(self, key)
            if section is not None and section.task and section.task != task:
                yield (
                    key,
                    f"the one that is chosen is for {section.task}, but training is for {task}; "
                    "an experiment (experiment=vqa_scenes, experiment=caption_scenes) chooses what belongs "
                    "together",
                )
        if isinstance(self.data, ShardsConfig) and self.training.token_cache:
            yield "training.token_cache", "a stream (data=shards) has no end to cache; give false"
        for this, data, training in (
            ("vqa", ScenesVQAConfig, ScenesVQATrainingConfig),
            ("captioning", ScenesCaptionsConfig, ScenesCaptionTrainingConfig),
        ):
            scenes = isinstance(self.data, data)
            if task == this and scenes != isinstance(self.training, training):
                which = f"{this}_scenes" if scenes else this
                yield "training", f"not the one for these data; choose training={which}"


@dataclass
class ExplainConfig(Section):
    """``clipmapper explain``.

    ``architecture``: see :func:`clipmapper.models.build.load`.

    Of a model that answers questions: ``question``, and ``answer``, the one to explain (null: the predicted).
    Of a captioner: ``caption``, the one to explain (null: the one that it writes), ``word``, one word of it
    alone (null: all), and ``word_weights``.
    """

    checkpoint: str = setting(text=True)
    architecture: str | None = setting(text=True)
    image: str = setting(text=True)
    question: str | None = setting(text=True)
    method: str = setting(choices=METHODS)
    answer: str | None = setting(text=True)
    caption: str | None = setting(text=True)
    word: str | None = setting(text=True)
    word_weights: str = setting(choices=("mean", "clip"))
    output: str = setting(text=True)
    compare: bool = setting()
    device: str = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _device_problems(self.device)


@dataclass
class PerturbConfig(Section):
    """``clipmapper perturb``. ``chunk``: how many samples are settled between two savings.

    ``data``: what is explained; null: the built-in world that the checkpoint was trained on.
    ``word_weights`` and ``caption_scores`` are for captioners, and null otherwise.
    """

    checkpoint: str = setting(text=True)
    architecture: str | None = setting(text=True)
    data: DataConfig | None = setting()
    methods: list[str] = setting(choices=METHODS)
    samples: int = setting(minimum=1)
    split: str = setting(choices=("validation", "held_out", "train", "test"))
    word_weights: str | None = setting(choices=("mean", "cider", "clip"))
    caption_scores: list[str] | None = setting(choices=CAPTION_SCORES)
    output: str = setting(text=True)
    resume: bool = setting()
    batch_size: int = setting(minimum=1)
    chunk: int = setting(minimum=1)
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    device: str = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _list_problems("methods", self.methods)
        if self.caption_scores is not None:
            yield from _list_problems("caption_scores", self.caption_scores)
        yield from _device_problems(self.device)


@dataclass
class PretrainConfig(Section):
    """``clipmapper pretrain_clip``. ``pretrained``: weights to go on from, null for random ones."""

    architecture: str = setting(text=True)
    pretrained: str | None = setting(text=True)
    output: str = setting(text=True)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    max_steps: int = setting(minimum=1)
    batch_size: int = setting(minimum=1)
    variants: int = setting(minimum=1)
    caption_weight: float = setting(minimum=0)
    precision: str = setting(choices=("32-true", "bf16-mixed"))
    learning_rate: float = setting(above=0)
    weight_decay: float = setting(minimum=0)
    warmup_steps: int = setting(minimum=0)
    workers: int = setting(minimum=0)
    checkpoint_every: int = setting(minimum=1)
    resume: bool = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.batch_size % self.variants:
            yield (
                "batch_size",
                f"{self.batch_size} is no multiple of the {self.variants} variants of a scene",
            )


def _list_problems(key: str, values: list[str]) -> Iterator[tuple[str, str]]:
    if not values:
        yield key, "is an empty list"
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        yield key, f"{twice[0]!r} is listed twice"


def _is_plain(value: Any) -> bool:
    """Whether JSON and YAML have it: numbers that are finite, text, and lists and dictionaries of them."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and isfinite(value))


def device_problem(device: str) -> str | None:
    """Why this is not the name of a device; None if it is."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        return None
    return f"{device!r} is not one of auto, cpu, cuda, cuda:0 (and so on), mps"


def _device_problems(device: str) -> Iterator[tuple[str, str]]:
    if problem := device_problem(device):
        yield "device", problem


def register() -> None:
    """Make the schema known to Hydra, under the names in the defaults lists of ``conf/``."""
    store = ConfigStore.instance()
    schemas = {
        "train_schema": TrainConfig,
        "explain_schema": ExplainConfig,
        "perturb_schema": PerturbConfig,
        "pretrain_clip_schema": PretrainConfig,
        "vqa_model_schema": VQAModelConfig,
        "caption_model_schema": CaptionModelConfig,
        "scenes_vqa_schema": ScenesVQAConfig,
        "scenes_captions_schema": ScenesCaptionsConfig,
        "coco_captions_schema": CocoCaptionsConfig,
        "manifest_schema": ManifestConfig,
        "huggingface_schema": HuggingFaceConfig,
        "shards_schema": ShardsConfig,
        "vqa_v2_schema": VQAv2Config,
        "flickr_captions_schema": FlickrCaptionsConfig,
        "vqa_training_schema": VQATrainingConfig,
        "scenes_vqa_training_schema": ScenesVQATrainingConfig,
        "caption_training_schema": CaptionTrainingConfig,
        "scenes_caption_training_schema": ScenesCaptionTrainingConfig,
        "wandb_logger_schema": WandbLoggerConfig,
        "csv_logger_schema": CSVLoggerConfig,
        "tensorboard_logger_schema": TensorBoardLoggerConfig,
        "mlflow_logger_schema": MLflowLoggerConfig,
        "other_logger_schema": OtherLoggerConfig,
        "no_callbacks_schema": CallbacksConfig,
        "relevance_callback_schema": RelevanceCallbackConfig,
    }
    for name, schema in schemas.items():
        store.store(name=name, node=schema)
