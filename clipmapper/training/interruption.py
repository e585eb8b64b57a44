"""Stopping a run so that it can go on later."""

import signal
from pathlib import Path
from typing import NoReturn

import lightning


class RunInterrupted(Exception):
    """The user stopped the run; its checkpoint is complete."""


class GracefulInterrupt(lightning.Callback):
    """On Ctrl-C or SIGTERM: finish the step that is running, save a checkpoint, stop.

    Lightning's own handling stops in the middle of a step, after which weights and optimiser may not belong
    together. A second Ctrl-C stops at once. Ends ``fit`` with ``RunInterrupted``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interrupted = False
        self._previous: dict = {}

    # Not earlier: when fit ends, Lightning puts back the handlers that it found before training started.
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                return

    def _ask(self, number: int, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping after this step (press Ctrl-C again to stop at once)", flush=True)

    def on_train_batch_end(self, trainer: lightning.Trainer, module, outputs, batch, index: int) -> None:
        if self.interrupted:
            self._stop(trainer)

    def _stop(self, trainer: lightning.Trainer) -> NoReturn:
        trainer.save_checkpoint(self.path)
        raise RunInterrupted(f"stopped after step {trainer.global_step}")

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._restore()
        if self.interrupted:  # in the validation behind the last step: the run has more to do than to fit
            self._stop(trainer)

    def on_exception(self, trainer: lightning.Trainer, module, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
