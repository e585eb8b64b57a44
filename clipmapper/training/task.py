"""What a task (answering questions, writing captions) adds to a run; the rest, run.py, is shared."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import nn

from clipmapper.settings.schema import TrainConfig
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import Share


@runtime_checkable
class Split(Protocol):
    """What has samples, some of which can be taken."""

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
        """What a run says about it."""
        return [
            f"{name}: {drawn:,} of {count:,} samples are scored (training.validation_samples)"
            for name, (drawn, count) in self.counts.items()
        ]

    def numbers(self) -> dict[str, dict[str, int]]:
        """The same for ``results.json``."""
        return {name: {"samples": drawn, "of": count} for name, (drawn, count) in self.counts.items()}


class Task(ABC):
    """``training._target_`` names the class, which is called with the run's settings and its data.

    ``model``: on the settings' device when ``prepare`` is called. ``validation_splits``: names of the splits
    that are scored; ``<first of them>/loss`` is among what the module logs, and so is
    ``<first of them>/<objective>``, what a sweep looks for the highest of. ``validated``: how much of each is
    scored.
    """

    model: nn.Module
    validation_splits: Sequence[str]
    validated: ValidationSubset
    objective: str
    workers: int = 0  # processes that make batches

    @abstractmethod
    def __init__(self, config: TrainConfig, data) -> None:
        """Check the settings against the data and build the model (``UserError`` where they do not fit)."""

    @abstractmethod
    def prepare(self, explainer: Callback | None, folder: Path) -> None:
        """Everything before the first step. ``explainer``: the callback of the settings."""

    @abstractmethod
    def module(self) -> TaskModule:
        """What Lightning trains."""

    @abstractmethod
    def batch_at(self, step: int, share: Share) -> dict:
        """A share of the training batch of a step, the same whenever it is asked for.

        The shares of a step together are its batch, whatever their number. ``ids`` names the samples.
        """

    @abstractmethod
    def labelled(self, split: str):
        """What has ``labelled(batch_size, share)``: a share of a validation split in order, in batches.

        As :func:`~clipmapper.training.processes.batches_of` shares it out.
        """

    @abstractmethod
    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """What came out, for ``results.json``, behind the last validation."""

    @abstractmethod
    def tables(self, results: Mapping) -> list[Table]:
        """``results`` to be printed."""
