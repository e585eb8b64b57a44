"""Keep the weights of the best validation, and stop a run that finds no better one."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from clipmapper.errors import UserError
from clipmapper.training.checkpoint import previous_of, steps_of
from clipmapper.training.processes import in_main
from clipmapper.training.shown import console


class KeepBest(lightning.Callback):
    """Save the weights whenever a validation is the best so far. To come before callbacks that ask for it.

    ``monitor``: the score, as the module logs it; ``mode``: "max" or "min". ``patience``: how many
    validations without a better one end the run, None: none do. Of equal ones the first is the best.

    The weights are saved behind the validation, when moving averages and adapters are back in their places
    (:meth:`clipmapper.training.module.TaskModule.on_validation_end` calls :meth:`save`).

    What is known of the validations so far travels in the run's own checkpoint, which is of a moment before
    the validation of its step: a run that is resumed makes that one again, and finds the same.
    """

    def __init__(self, path: Path, monitor: str, mode: str, patience: int | None) -> None:
        self.path, self.monitor, self.mode, self.patience = path, monitor, mode, patience
        self.validations: list[list] = []  # [step, score]
        self.best: list | None = None
        self.is_best = False  # the validation that is just over
        self.stopped = False
        self.loggers: list[Logger] = []  # of a run that is over
        self.over = False  # the run's own validations: what is validated now is the best one again

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.best = state_dict["validations"], state_dict["best"]
        if not in_main(self._is_there):
            console().print(
                f"{self.path}: not the best so far, of step {self.best[0]}; the next is kept anew"
            )
            self.best = None

    def _is_there(self) -> bool:
        """Whether the file is the best one that the run's checkpoint knows of. A run that was killed may have
        replaced it by that of a later validation, which is made again."""
        if self.best is None or steps_of(self.path) == self.best[0]:
            return True
        previous = previous_of(self.path)
        if steps_of(previous) != self.best[0]:
            return False
        os.replace(previous, self.path)
        return True

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.over:
            return
        step, score = trainer.global_step, monitored(trainer, self.monitor)
        self.validations = [[at, was] for at, was in self.validations if at != step] + [[step, score]]
        # Also where the validation of the best step is made again, by a run that was killed behind it.
        self.is_best = self.best is None or self.best[0] == step or better(score, self.best[1], self.mode)
        if self.is_best:
            self.best = [step, score]
        if self.patience is not None and self.since_best() >= self.patience:
            self.stopped = trainer.should_stop = True

    def since_best(self) -> int:
        """How many validations came after the best one."""
        return sum(step > self.best[0] for step, _ in self.validations)

    def save(self, trainer: lightning.Trainer) -> None:
        """Save what :meth:`on_validation_end` found to be the best. All of several processes call it."""
        if self.is_best and not self.over:
            trainer.save_checkpoint(self.path)

    def put_back(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> bool:
        """Give the module the best weights; says whether they are others than it had. The run is over then.

        What is validated from now on is logged already: only explanations go to the loggers.
        """
        self.over = True
        if self.is_best:
            return False
        self.loggers, trainer.loggers = list(trainer.loggers), []
        state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        put_weights(trainer, module, state)
        return True

    def line(self) -> str:
        """Say which validation was the best."""
        step, score = self.best
        stopped = f", and {self.since_best()} since then were no better (trainer.patience)" * self.stopped
        return (
            f"best of {len(self.validations)} validations: that of step {step} ({self.monitor} {score:.4g})"
            f"{stopped}; what follows is of its weights"
        )

    def results(self) -> dict:
        """For ``results.json``."""
        step, score = self.best
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "step": step,
            "value": score if math.isfinite(score) else None,
            "validations": [[at, was if math.isfinite(was) else None] for at, was in self.validations],
            "stopped_early": self.stopped,
        }


def monitored(trainer: lightning.Trainer, name: str) -> float:
    """A score of the last validation. Raises ``UserError`` for one that it has not logged."""
    if name not in trainer.callback_metrics:
        known = ", ".join(sorted(one for one in trainer.callback_metrics if not one.startswith("train/")))
        raise UserError(f"trainer.monitor={name}: a validation logs no such score; it logs {known}")
    return float(trainer.callback_metrics[name])


def better(score: float, other: float, mode: str) -> bool:
    """Nothing is better than a number by not being one."""
    if not (math.isfinite(score) and math.isfinite(other)):
        return math.isfinite(score)
    return score > other if mode == "max" else score < other


def put_weights(
    trainer: lightning.Trainer, module: lightning.LightningModule, state: Mapping[str, Tensor]
) -> None:
    """Give the module these weights, behind its training. All of several processes call it."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
        return
    module.load_state_dict(state)
    for callback in trainer.callbacks:  # which would put its averages in for a validation
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model.module.load_state_dict(state)
