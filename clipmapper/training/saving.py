"""When a run saves what it can be resumed from."""

from pathlib import Path

import lightning


class SaveSteps(lightning.Callback):
    """Save every ``every`` steps, behind the last one, and behind each that a validation follows.

    Validations, with explanations, may take longer than the steps between them: who stops in one is not to
    lose those. ``validated_every``: steps between two validations, None where there are none.
    A checkpoint is of a moment before the validation of its step, if that has one.
    """

    def __init__(self, path: Path, every: int, validated_every: int | None = None) -> None:
        self.path = path
        self._every = {every, *([] if validated_every is None else [validated_every])}
        self.saved: int | None = None

    def on_train_batch_end(self, trainer: lightning.Trainer, module, outputs, batch, index: int) -> None:
        step = trainer.global_step
        between_steps = (index + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and (step == trainer.max_steps or any(step % every == 0 for every in self._every)):
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Of several processes all have to call it. Once a step is enough."""
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(self.path)
            self.saved = trainer.global_step
