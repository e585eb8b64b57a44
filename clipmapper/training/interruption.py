"""Stopping a run so that it can go on later."""

import os
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import lightning
from lightning.fabric.plugins.environments import SLURMEnvironment

from clipmapper.training.processes import in_any, is_main

# What SLURM (--signal=USR1@90) and submitit (USR2) send some time before they end a job.
_REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class RunInterrupted(Exception):
    """The user stopped the run; its checkpoint is complete."""


class GracefulInterrupt(lightning.Callback):
    """On Ctrl-C or SIGTERM: finish the step that is running, save a checkpoint, stop.

    Lightning's own handling stops in the middle of a step, after which weights and optimiser may not belong
    together. A second Ctrl-C stops at once. Ends ``fit`` with ``RunInterrupted``. Of several processes all
    stop behind the same step, whichever was told.

    In a SLURM job also on SIGUSR1 and SIGUSR2, behind which the job goes back into the queue: by submitit, if
    that has started it, otherwise by ``scontrol requeue``. The job goes on with the run when it is started
    again (:func:`clipmapper.training.run_folder.run_of_requeued_job`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interrupted = False
        self._requeue: int | None = None
        self._previous: dict = {}

    # Not earlier: when fit ends, Lightning puts back the handlers that it found before training started.
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        requeue = _REQUEUE_SIGNALS if SLURMEnvironment.detect() else ()
        for number in (signal.SIGINT, signal.SIGTERM, *requeue):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                return

    def _ask(self, number: int, frame) -> None:
        if number in _REQUEUE_SIGNALS:
            self._requeue = number
        elif self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if is_main():
            more = "" if self._requeue else " (press Ctrl-C again to stop at once)"
            print(f"\nstopping after this step{more}", flush=True)

    def on_train_batch_end(self, trainer: lightning.Trainer, module, outputs, batch, index: int) -> None:
        between_steps = (index + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and in_any(self.interrupted):
            self._stop(trainer)

    def _stop(self, trainer: lightning.Trainer) -> NoReturn:
        trainer.save_checkpoint(self.path)
        if in_any(self._requeue is not None):
            self._go_back_into_the_queue()
        raise RunInterrupted(f"stopped after step {trainer.global_step}")

    def _go_back_into_the_queue(self) -> None:
        of_submitit = {n: handler for n in _REQUEUE_SIGNALS if callable(handler := self._previous.get(n))}
        if of_submitit:
            self._restore()
            number, handler = of_submitit.popitem()
            handler(number, None)  # ends this process
        elif is_main():
            job = os.environ["SLURM_JOB_ID"]
            if "SLURM_ARRAY_JOB_ID" in os.environ:
                job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            subprocess.run(["scontrol", "requeue", job], check=True)

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._restore()
        if in_any(self.interrupted):  # in the validation behind the last step: the run is not done
            self._stop(trainer)

    def on_exception(self, trainer: lightning.Trainer, module, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
