# ruff: noqa: RUF009 (setting() is dataclasses.field)
"""The settings of the commands that do not train CLIPmapper."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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


@dataclass
class ExplainConfig(Section):
    """``clipmapper explain``.

    ``architecture``: see :func:`clipmapper.tasks.registry.load`.

    Of a model that answers questions: ``question``, and ``answer``, the one to explain (null: the predicted).
    Of a captioner: ``caption``, the one to explain (null: the one that it writes), ``word``, one word of it
    alone (null: all), ``word_weights`` and ``word_maps``. ``explained``: of the answer or of each word its
    logit (null), probability or log-probability.
    """

    checkpoint: str = setting()
    architecture: str | None = setting()
    image: str = setting()
    question: str | None = setting()
    method: str = setting(choices=explanation_methods)
    answer: str | None = setting()
    caption: str | None = setting()
    word: str | None = setting()
    word_weights: str | None = setting(choices=("mean", "clip"))
    word_maps: str | None = setting(choices=WORD_MAPS)
    explained: str | None = setting(choices=explained_scalars)
    output: str = setting()
    compare: bool = setting()
    device: str = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from device_problems(self.device)


@dataclass
class PerturbConfig(Section):
    """``clipmapper perturb``. ``chunk``: how many samples are settled between two savings.

    ``data``: what is explained; null: the built-in world that the checkpoint was trained on.
    ``explained`` as of :class:`ExplainConfig`. ``word_weights``, ``word_maps`` and ``caption_scores`` are for
    captioners, and null otherwise.
    """

    checkpoint: str = setting()
    architecture: str | None = setting()
    data: DataConfig | None = setting()
    methods: list[str] = setting(choices=explanation_methods)
    scores: list[str] = setting(choices=EXPLANATION_SCORES)
    samples: int = setting(minimum=1)
    split: str = setting(choices=("validation", "held_out", "train", "test"))
    explained: str | None = setting(choices=explained_scalars)
    word_weights: str | None = setting(choices=("mean", "cider", "clip"))
    word_maps: str | None = setting(choices=WORD_MAPS)
    caption_scores: list[str] | None = setting()
    output: str = setting()
    resume: bool = setting()
    batch_size: int = setting(minimum=1)
    chunk: int = setting(minimum=1)
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    device: str = setting()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from list_problems("methods", self.methods)
        yield from list_problems("scores", self.scores)
        if self.caption_scores is not None:
            yield from list_problems("caption_scores", self.caption_scores)
        yield from device_problems(self.device)


@dataclass
class EvaluateConfig(Section):
    """``clipmapper evaluate``.

    ``checkpoint``: one, or several as ``[a,b]``, of which the first is what others are compared with.
    ``data``: as of :class:`PerturbConfig`. ``chunk``: how many samples are settled between two savings.
    ``methods``, ``scores``, ``explained`` and ``samples`` are of ``explain``, as of :class:`PerturbConfig`.
    """

    # As of TrainerConfig, of which devices are started.
    num_nodes: ClassVar[int] = 1
    timeout_minutes: ClassVar[float] = 30.0

    checkpoint: Any = setting(text=True)  # OmegaConf has no type for a text or a list
    architecture: str | None = setting()
    data: DataConfig | None = setting()
    split: str = setting(choices=("validation", "held_out", "train", "test", "all"))
    output: str = setting()
    resume: bool = setting()
    batch_size: int | None = setting(minimum=1)
    chunk: int = setting(minimum=1)
    precision: str = setting(choices=("32-true", "16-mixed", "bf16-mixed"))
    token_precision: str = setting(choices=("float16", "float32"))
    accelerator: str = setting(choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: str = setting()
    confidence: float = setting(above=0, below=1)
    seed: int = setting(minimum=0, maximum=SEED_LIMIT)
    explain: bool = setting()
    methods: list[str] = setting(choices=explanation_methods)
    scores: list[str] = setting(choices=EXPLANATION_SCORES)
    explained: str | None = setting(choices=explained_scalars)
    samples: int = setting(minimum=1)

    def __post_init__(self) -> None:
        given = self.checkpoint
        if isinstance(given, str):
            inside = re.fullmatch(r"\s*\[(.*)\]\s*", given, re.DOTALL)
            if inside is None or Path(given).exists():
                self.checkpoint = [given]
            else:
                self.checkpoint = [one.strip().strip("'\"") for one in inside[1].split(",")]

    def problems(self) -> Iterator[tuple[str, str]]:
        if not isinstance(self.checkpoint, list) or not all(isinstance(one, str) for one in self.checkpoint):
            yield "checkpoint", f"{self.checkpoint!r} is not a path, and not a list of some, as [a,b]"
        else:
            yield from list_problems("checkpoint", self.checkpoint)
        if self.explain and self.split == "all":
            yield "explain", "the samples that are explained are of one split; give split=…, or explain=false"
        yield from devices_problems(self.devices)
        yield from list_problems("methods", self.methods)
        yield from list_problems("scores", self.scores)


@dataclass
class ExportConfig(Section):
    """``clipmapper export``: a trained model as a folder. ``precision``: of the weights in it."""

    checkpoint: str = setting()
    architecture: str | None = setting()
    folder: str = setting()
    precision: str = setting(choices=("float32", "float16"))


@dataclass
class PretrainConfig(Section):
    """``clipmapper pretrain_clip``. ``pretrained``: weights to go on from, null for random ones."""

    architecture: str = setting()
    pretrained: str | None = setting()
    output: str = setting()
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


def device_problems(device: str) -> Iterator[tuple[str, str]]:
    """As of :meth:`Section.problems`."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        yield "device", f"{device!r} is not one of auto, cpu, cuda, cuda:0 (and so on), mps"
