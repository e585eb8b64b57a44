"""What a task (answering questions, writing captions) adds to a run; the rest, run.py, is shared."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import nn

from clipmapper.config import TrainConfig
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import Share
from clipmapper.training.validation_subset import ValidationSubset


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
