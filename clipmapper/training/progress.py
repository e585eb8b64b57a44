"""How far a run is: bars on a terminal, lines in a log."""

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.host.progress import ProgressLines
from clipmapper.training.processes import from_all, in_any, is_main


def steps_progress(refresh_rate: int) -> ProgressBar:
    """The callback that says it. ``refresh_rate``: batches between two looks of a bar."""
    return StepsBar(refresh_rate=refresh_rate) if sys.stdout.isatty() else StepsLines()


class StepsBar(TQDMProgressBar):
    """Lightning's, of all batches of a run that has a number of steps, also where the run is a resumed one.

    Lightning's own counts batches against the steps that are left, and is told of them at an epoch's
    beginning, which a resumed run is past. Validation data that know how many batches they are have a total.
    """

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        return _validation_batches(self.trainer)[self._current_eval_dataloader_idx or 0]

    def on_train_start(self, trainer: lightning.Trainer, *others) -> None:
        super().on_train_start(trainer, *others)
        bar = self.train_progress_bar
        bar.reset(self.total_train_batches)
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches
        bar.set_description(f"Epoch {trainer.current_epoch}")


class StepsLines(ProgressBar):
    """A line a minute: steps of how many, and batches of a validation of how many."""

    def disable(self) -> None:
        """Lightning's way to say that this is not the main process, which is asked for instead."""

    def enable(self) -> None:
        """See ``disable``."""

    def on_train_start(self, trainer: lightning.Trainer, *others) -> None:
        super().on_train_start(trainer, *others)
        self._steps = ProgressLines("training steps", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, *others) -> None:
        if is_main():
            self._steps.to(trainer.global_step)

    def on_validation_start(self, trainer: lightning.Trainer, *others) -> None:
        super().on_validation_start(trainer, *others)
        batches = sum(_validation_batches(trainer))
        total = None if batches == float("inf") else int(batches)
        self._validated = ProgressLines(f"validation after step {trainer.global_step}, batches", total)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *others) -> None:
        if is_main():
            self._validated.advance()


def _validation_batches(trainer: lightning.Trainer) -> list[int | float]:
    """Count the batches of each of the data loaders."""
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return [
        loader.dataset.batches() if hasattr(getattr(loader, "dataset", None), "batches") else count
        for loader, count in zip(loaders, counts, strict=True)
    ]


class StopAtNonFinite(lightning.Callback):
    """Before every step of the optimiser: are the loss and the gradient numbers?

    If not, the step is not made, a checkpoint with the weights as they were is saved to ``path``, and the run
    ends with a ``UserError`` that names the samples (``batch["ids"]``) whose loss it was; where only the
    gradient is not finite, all samples of the step.

    In ``16-mixed`` a gradient may overflow: the loss scaler skips such a step by itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._batches: list[tuple[list, Tensor]] = []  # of this step: several with accumulated gradients
        self._ids: list = []

    def on_train_batch_start(self, trainer: lightning.Trainer, module, batch: dict, index: int) -> None:
        self._ids = list(batch["ids"])

    def on_before_backward(self, trainer: lightning.Trainer, module, loss: Tensor) -> None:
        self._batches.append((self._ids, loss.detach()))

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module, optimizer) -> None:
        batches, self._batches = self._batches, []
        losses = torch.stack([loss for _, loss in batches])
        total = losses.abs().sum()
        if trainer.scaler is None:
            total = total + _gradient_norm(module)
        if not in_any(not bool(total.isfinite())):
            return
        bad = [ids for (ids, _), fine in zip(batches, losses.isfinite().tolist(), strict=True) if not fine]
        named = [sample for part in from_all(bad) for ids in part for sample in ids]
        what = "the loss" if named else "the gradient"
        named = named or [sample for part in from_all(batches) for ids, _ in part for sample in ids]
        kept = f"{self.path} is from an earlier step"
        if not in_any(any(not weight.isfinite().all() for weight in module.parameters())):
            trainer.save_checkpoint(self.path)
            kept = f"the weights before it are in {self.path}"
        raise UserError(
            f"{what} of step {trainer.global_step + 1} is not a finite number; it was not made and {kept}. "
            f"Samples: {', '.join(map(str, named))}"
        )


def _gradient_norm(module: torch.nn.Module) -> Tensor:
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded weights: of all processes
