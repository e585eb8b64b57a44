"""How long a run is: steps of epochs, when it is validated, how long it will take."""

import math
import time
from dataclasses import dataclass, replace

import lightning

from clipmapper.data.records import RecordData
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.processes import is_main
from clipmapper.training.shown import console

_VALIDATIONS = 10  # of own data, at least
_TRIED = 20  # steps that are timed


@dataclass(frozen=True)
class Steps:
    """``config``: with steps in place of epochs and shares. ``line``: says it; None where nothing was made of
    epochs."""

    config: TrainConfig
    line: str | None


def in_steps(config: TrainConfig, data: RecordData) -> Steps:
    """Make steps of what the settings say in epochs, and of null as the interval between validations.

    Records have epochs; the built-in world is drawn step by step, and validated at the end. A step that
    begins in one epoch may end in the next: no sample is left out.
    """
    training, trainer = config.training, config.trainer
    steps, line = training.max_steps, None
    if not config.training.world:
        count = len(data.splits["train"]) if data.stream is None else data.train_records
        an_epoch = count / training.batch_size
        steps = steps or max(1, math.ceil(training.max_epochs * an_epoch - 1e-9))
        what = "questions" if data.kind == "questions" else "images"
        line = f"{math.ceil(an_epoch):,} steps are one epoch of {count:,} {what}; training takes {steps:,}"
        if trainer.val_check_interval is None:
            often = min(math.ceil(an_epoch), math.ceil(steps / _VALIDATIONS))
            trainer = replace(trainer, val_check_interval=max(1, often))
    warmup = training.warmup_steps
    warmup = round(training.warmup_share * steps) if warmup is None else warmup
    if warmup >= steps:
        never = f"a warm-up of {warmup:,} steps: in {steps:,} the learning rate never gets to its value"
        line = never if line is None else f"{line}; {never}"
    training = replace(training, max_steps=steps, max_epochs=None, warmup_steps=warmup, warmup_share=None)
    return Steps(replace(config, training=training, trainer=trainer), line)


class TimeLeft(lightning.Callback):
    """Says how long a run will take, once it is known: behind the first steps."""

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._first, self._began = trainer.global_step + 1, None

    def on_train_batch_end(self, trainer: lightning.Trainer, module, outputs, batch, index: int) -> None:
        step = trainer.global_step
        if self._began is None and step == self._first:  # which compiles, and starts workers
            self._began = time.monotonic()
        elif self._began is not None and step == self._first + _TRIED and is_main():
            left = trainer.max_steps - step
            seconds = (time.monotonic() - self._began) / _TRIED * left
            if left > _TRIED:
                told = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
                console().print(f"about {told} for the other {left:,} steps, without validations")
            self._began = math.nan
