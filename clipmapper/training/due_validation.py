"""The validation that a run was about to begin when it was stopped."""

import lightning


class DueValidation(lightning.Callback):
    """Validate before the first step where the checkpoint is of a step with a validation.

    :class:`~clipmapper.training.saving.SaveSteps` saves before a validation. Lightning takes one that such a
    checkpoint belongs to for done; a run that is resumed is to have made every one that an uninterrupted run
    makes. ``every``: steps between two validations. To be the last callback.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        step = trainer.global_step
        if step == 0 or step % self.every or step >= trainer.max_steps:
            return
        # As Lightning's loop over batches does behind a step.
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
