"""The progress bar of a run."""

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar


class StepsBar(TQDMProgressBar):
    """Lightning's, of all batches of a run that has a number of steps, also where the run is a resumed one.

    Lightning's own counts batches against the steps that are left, and is told of them at an epoch's
    beginning, which a resumed run is past.
    """

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_start(self, trainer: lightning.Trainer, *others) -> None:
        super().on_train_start(trainer, *others)
        bar = self.train_progress_bar
        bar.reset(self.total_train_batches)
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches
        bar.set_description(f"Epoch {trainer.current_epoch}")
