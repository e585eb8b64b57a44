"""The base classes of tasks: of what a task is, and of a task that is trained on some data."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import lightning
import numpy as np
from rich.table import Table
from torch import nn

from clipmapper.data.augment import Augmentation
from clipmapper.data.records import RecordData
from clipmapper.data.tables.base import Records
from clipmapper.data.token_cache import TokenStore
from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.chosen import REMOVAL, check_scores
from clipmapper.models.description import ModelRules
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.batches import SplitBatches
from clipmapper.training.encoder_tokens import token_store
from clipmapper.training.evaluated import Evaluation, Forwards
from clipmapper.training.explained import Explanation, Report, Samples
from clipmapper.training.initial import Taken, take_alike, take_encoder, take_mapper
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import WHOLE, Share, this_share
from clipmapper.training.record_tokens import check_room


@runtime_checkable
class Split(Protocol):
    """Samples, some of which can be taken."""

    def __len__(self) -> int: ...

    def take(self: "_Split", places: np.ndarray) -> "_Split": ...


_Split = TypeVar("_Split", bound=Split)


class ValidationSubset:
    """At most ``samples`` of every validation split, drawn by ``seed`` and the split's name; None: all.

    The same in every process, at every validation (the last one too) and in a resumed run. ``counts``: name →
    how many are scored and how many there are; empty where nothing was said of samples.
    """

    def __init__(self, samples: int | None, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.counts: dict[str, tuple[int, int]] = {}

    def of(self, name: str, split: _Split) -> _Split:
        """The samples of a split that are scored, in the split's order."""
        if self.samples is None:
            return split
        count = len(split)
        self.counts[name] = min(self.samples, count), count
        if self.samples >= count:
            return split
        rng = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        return split.take(np.sort(rng.choice(count, self.samples, replace=False)))

    def lines(self) -> list[str]:
        """Say how much is scored."""
        return [
            f"{name}: {drawn:,} of {count:,} samples are scored (training.validation_samples)"
            for name, (drawn, count) in self.counts.items()
        ]

    def numbers(self) -> dict[str, dict[str, int]]:
        """The same for ``results.json``."""
        return {name: {"samples": drawn, "of": count} for name, (drawn, count) in self.counts.items()}


class TaskRun(ABC):
    """A task on the run's data: what a run needs of it; the rest, :mod:`clipmapper.commands.train`, is
    shared.

    ``model``: on the settings' device when ``prepare`` is called. ``validation_splits``: names of the splits
    that are scored; ``<first of them>/loss`` is among what the module logs, and so is
    ``<first of them>/<objective>``, what a sweep looks for the highest of. ``validated``: how much of each is
    scored. ``splits``: the batches of each of them, behind ``prepare``. ``batch_at(step, share)``: a share of
    the training batch of a step, the same whenever it is asked for; the shares of a step together are its
    batch, whatever their number, and ``ids`` names the samples.
    """

    model: nn.Module
    objective: str
    splits: dict[str, SplitBatches]
    batch_at: Callable[[int, Share], dict]

    def __init__(self, config: TrainConfig, data: RecordData) -> None:
        """Check the settings against the data and build the model (``UserError`` where they do not fit)."""
        self.config, self.data = config, data
        self.validation_splits, self.workers = data.validation_splits, data.workers
        self.validated = ValidationSubset(config.training.validation_samples, config.seed)
        if data.stream is not None:
            check_readers(data, config.trainer.accumulate_grad_batches)

    def scored_splits(self) -> dict[str, Records]:
        """The splits that have numbers; of those for validation, what is scored."""
        return {
            name: self.validated.of(name, records) if name in self.validation_splits else records
            for name, records in self.data.splits.items()
        }

    def token_store(self, splits: Mapping[str, Records], *, texts: bool) -> TokenStore | None:
        """Where the settings want tokens of these splits kept, for which there is room; None where every step
        is to encode. ``texts``: whether tokens of questions are to be kept as well."""
        encoder = self.model.encoder
        store = token_store(self.config, encoder, texts=texts, augment=self.data.augment)
        if store is not None:
            check_room(encoder, store, splits, self.data.reader(encoder), texts=texts)
        return store

    def augment(self) -> None:
        """Behind ``prepare``: have the images of training batches, and no others, altered as the data's
        settings say (``data.augment``)."""
        if self.data.augment == "none":
            return
        alter = Augmentation(self.data.augment, self.model.encoder.clip.visual, self.config.seed)
        unaltered = self.batch_at

        def batch_at(step: int, share: Share = WHOLE) -> dict:
            batch = unaltered(step, share)
            names = batch.get("image_names", batch["ids"])
            return batch | {"images": alter(batch["images"], step, names)}

        self.batch_at = batch_at

    def schedule(self) -> dict[str, float]:
        """The settings that every :class:`TaskModule` takes."""
        names = ("learning_rate", "weight_decay", "warmup_steps", "max_steps")
        return {name: getattr(self.config.training, name) for name in names}

    def take(self, other: nn.Module, source: str) -> Taken:
        """Give the model what fits of ``other``, a trained one of any task, called ``source`` in messages."""
        taken = Taken(source)
        if self.config.encoder.pretrained is None:
            take_encoder(self.model, other, taken)
        else:
            taken.nothing("encoder", self.model.encoder, "encoder.pretrained says which")
        take_mapper(self.model, other, taken)
        self.take_head(other, taken)
        return taken

    def take_head(self, other: nn.Module, taken: Taken) -> None:
        """Of a model of the same task, what has the same name and size."""
        if other.task == self.model.task:
            take_alike(self.model.head, other.head, "head", taken)
        else:
            taken.nothing("head", self.model.head, f"that model is for {other.task}")

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Everything before the first step. ``folder``: of the run."""

    @abstractmethod
    def module(self) -> TaskModule:
        """The module that Lightning trains."""

    @abstractmethod
    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """The results for ``results.json``, behind the last validation."""

    @abstractmethod
    def tables(self, results: Mapping) -> list[Table]:
        """``results`` to be printed."""

    def warnings(self) -> list[str]:
        """Lines to be printed behind the tables."""
        return []

    def said(self, split: str) -> Sequence | None:
        """What the model said of each record of a split in the last validation, as the task's
        :class:`~clipmapper.training.evaluated.Evaluation` has it; None for a task that has none."""
        return None


class Task(ABC):
    """A kind of work that a two-stage model is trained for and explained at: all that differs between tasks.

    Attributes
    ----------
    name : in settings and checkpoints, and of ``model.task``.
    does : in messages, as in "this model answers questions".
    records : "questions" or "captions", of which the records of its data must have one.
    scores : the keys of ``results.json`` under which a run of it has its scores.
    explain_settings : the settings of ``clipmapper explain`` that are for this task and not for all; they
        come to :meth:`explain` where given.
    perturbed : of "image" and "text", those whose tokens :meth:`report` takes away.
    perturb_settings : those of ``clipmapper perturb`` and of the callback that explains while training, each
        with what :meth:`report` is given where they say nothing.
    """

    name: str
    does: str
    records: str
    scores: tuple[str, ...] = ()
    explain_settings: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ("image",)
    perturb_settings: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def rules(self) -> ModelRules:
        """Say what a checkpoint of this task may say of its model."""

    @abstractmethod
    def build(self, encoder: Mapping, description: Mapping) -> nn.Module:
        """The model of a checked description, without weights. ``encoder``: of
        :func:`clipmapper.models.checkpoint.build_encoder`."""

    @abstractmethod
    def run(self, config: TrainConfig, data: RecordData) -> TaskRun:
        """Training with these settings on these data."""

    @abstractmethod
    def samples(self, model: nn.Module, data: RecordData, split: str, count: int, seed: int) -> Samples:
        """``count`` samples of a split, drawn by ``seed``, to be explained.

        Raises ``UserError`` for a split that the data does not have, or that has nothing to explain.
        """

    @abstractmethod
    def report(
        self,
        model: nn.Module,
        samples: Samples,
        methods: Sequence[str],
        *,
        chunk: int,
        batch_size: int,
        seed: int,
        scores: Sequence[str] = (REMOVAL,),
        planted: bool = False,
        folder: Path | None = None,
        key: str = "",
        progress: Callable[[int], None] | None = None,
        **settings,
    ) -> Report:
        """Explain every sample by every method, score that by ``scores``
        (:data:`~clipmapper.settings.keys.EXPLANATION_SCORES`), compare with the truth.

        ``chunk`` samples are settled together; ``batch_size`` is the most perturbed variants in one forward.
        With ``folder`` finished chunks are kept there and taken up again when ``key`` is the same.
        ``progress`` is told of points of curves (:meth:`Samples.points`). ``settings``: all of
        ``perturb_settings``.

        ``planted``: score the maps of :data:`~clipmapper.evaluation.explanation_scores.planted.PLANTED` too,
        behind the methods (so many more, of which ``progress`` is told); they are in the values of ``scored``
        and nowhere else, and a report's ``judged`` says what the scores are worth. Raises ``UserError`` where
        it is not known of every sample what decides it.
        """

    @abstractmethod
    def explain(self, model: nn.Module, image, methods: Sequence[str], **settings) -> list[Explanation]:
        """Explain what the model says about one image, by several methods on the same forward and
        backward."""

    def evaluation(
        self, model: nn.Module, data: RecordData, records: Records, forwards: Forwards
    ) -> Evaluation:
        """A trained model on records, for ``clipmapper evaluate``. Raises ``UserError`` for a task that has
        none."""
        raise UserError(
            f"this checkpoint {self.does}: its task ({self.name}) has no evaluation, only training scores it"
        )

    def validation_scores(self, results: Mapping) -> Mapping[str, tuple[float | None, int]]:
        """Scores of validation by their titles, of a run's ``results.json``; each with what it is multiplied
        by in tables."""
        return {results["objective"]["name"]: (results["objective"]["value"], 1)}

    def check_explanation_scores(self, scores: Sequence[str]) -> None:
        """Raise ``UserError`` for a score of explanations that this task's models do not have."""
        check_scores(scores, self.perturbed)

    def report_settings(self, given: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """The ``perturb_settings``, as given where they are (not None), for :meth:`report`.

        ``section``: of which settings they are, in messages. Raises ``UserError`` for one that this task does
        not have, and where they can't be.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        for name in chosen:
            if name not in self.perturb_settings:
                has = ", ".join(self.perturb_settings) or "none of this kind"
                raise UserError(f"{section}{name}: this model {self.does}; its settings are {has}")
        self.check_settings(**chosen)
        return dict(self.perturb_settings) | chosen

    def check_settings(self, **settings) -> None:  # noqa: B027 (most tasks have nothing to check)
        """Raise ``UserError`` where the settings of :meth:`report` can't be, before anything is read."""

    def check_data(self, data: RecordData, where: str) -> None:
        """Raise ``UserError`` where these records are not what the task is about. ``where``: who asks."""
        if data.kind != self.records:
            raise UserError(
                f"{where}: it {self.does}, but these data have {data.kind}; choose others with data=…"
            )


def check_readers(data: RecordData, accumulated: int) -> None:
    """Raise ``UserError`` where a stream has fewer shards than readers, before training."""
    data.stream(0).check_readers(this_share().of * accumulated * max(data.workers, 1))
