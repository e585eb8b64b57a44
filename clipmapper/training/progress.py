"""How far a run is: bars on a terminal, lines in a log."""

import sys

import lightning
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from clipmapper.progress import ProgressLines
from clipmapper.training.processes import is_main


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
    """Of each of the data loaders."""
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return [
        loader.dataset.batches() if hasattr(getattr(loader, "dataset", None), "batches") else count
        for loader, count in zip(loaders, counts, strict=True)
    ]
