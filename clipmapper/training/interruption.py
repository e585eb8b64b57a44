"""Stopping a run so that it can go on later, by hand or at a loss that is no number."""

import itertools
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from clipmapper.errors import RunInterrupted, UserError
from clipmapper.host.stopping import SIGNALS, Stopped, of_another, reinstall
from clipmapper.training.processes import flag_raised, from_all, in_any, is_main, raise_flag


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
        """All of several processes have to call it. Once a step is enough."""
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(self.path)
            self.saved = trainer.global_step


class DueValidation(lightning.Callback):
    """Validate before the first step where the checkpoint is of a step with a validation.

    :class:`~clipmapper.training.interruption.SaveSteps` saves before a validation. Lightning takes one that
    such a checkpoint belongs to for done; a run that is resumed is to have made every one that an
    uninterrupted run makes. ``every``: steps between two validations. ``first``: validate the weights that
    the run begins with, too. To be the last callback.
    """

    def __init__(self, every: int, first: bool = False) -> None:
        self.every, self.first = every, first

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        step = trainer.global_step
        if (step == 0 and not self.first) or step % self.every or step >= trainer.max_steps:
            return
        # As Lightning's loop over batches does behind a step.
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first


# What SLURM (--signal=USR1@90) and submitit (USR2) send some time before they end a job.
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_ONCE = 1.0  # seconds: torchrun hands on a Ctrl-C that the terminal has given to all
_ASKING = 0.5  # seconds between two questions to the other processes

_numbers = itertools.count()  # the same in all processes: each makes the same callbacks


def requeue_job() -> None:
    """Put this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)


class GracefulInterrupt(lightning.Callback):
    """On Ctrl-C, SIGTERM, a closed terminal and the like: finish the step that is running, save, stop.

    Lightning's own handling stops in the middle of a step, after which weights and optimiser may not belong
    together. A second Ctrl-C stops at once. Ends ``fit`` with ``RunInterrupted``. Of several processes all
    stop behind the same step, whichever was told. A validation is left between two batches, and its
    explanations where :meth:`told` is asked; ``saving`` has saved before it, and it is made again.

    In a SLURM job also on SIGUSR1 and SIGUSR2, behind which the job goes back into the queue: by submitit, if
    that has started it, otherwise by ``scontrol requeue``. The job goes on with the run when it is started
    again (:func:`clipmapper.training.run_folder.run_of_requeued_job`).
    """

    def __init__(self, saving: SaveSteps) -> None:
        self.saving = saving
        self.interrupted = False
        self._first = self._asked = 0.0
        self._validating = False
        self._flag = f"stop {next(_numbers)}"
        self._requeue: int | None = None
        self._previous: dict = {}

    # Not earlier: when fit ends, Lightning puts back the handlers that it found before training started.
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # nohup
                continue
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                return

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number in REQUEUE_SIGNALS and SLURMEnvironment.detect():
            self._requeue = number
        elif self.interrupted:
            repeated = "TORCHELASTIC_RUN_ID" in os.environ and now - self._first < _ONCE
            if number == signal.SIGINT and not repeated:
                raise Stopped(number)
            return
        self.interrupted, self._first = True, now
        if is_main():
            where = "in this validation" if self._validating else "after this step"
            more = "" if self._requeue else " (press Ctrl-C again to stop at once)"
            with suppress(RuntimeError):  # the signal came while something was being printed
                print(f"\nstopping {where}{more}", flush=True)

    def on_train_batch_end(self, trainer: lightning.Trainer, module, outputs, batch, index: int) -> None:
        between_steps = (index + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and in_any(self.interrupted):
            self.saving.save(trainer)
            self.leave(f"stopped after step {trainer.global_step}")

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._validating = True
        if trainer.state.fn != TrainerFn.FITTING:
            # Lightning's handlers stand there, which speak to other processes wherever those are.
            reinstall()

    def on_train_batch_start(self, *others: object) -> None:
        self._validating = False

    def on_validation_batch_end(self, trainer: lightning.Trainer, *others: object) -> None:
        # Behind fit nothing needs to be finished: a signal stops at once.
        if trainer.state.fn == TrainerFn.FITTING and in_any(self.interrupted):
            self.leave(f"stopped in the validation after step {trainer.global_step}")

    def told(self) -> bool:
        """Whether this process was told to stop, or, as far as is known by now, another one was."""
        if self.interrupted:
            raise_flag(self._flag)
        elif (now := time.monotonic()) - self._asked > _ASKING:
            self._asked = now
            self.interrupted = flag_raised(self._flag)
        return self.interrupted

    def leave(self, where: str) -> NoReturn:
        """Raise ``RunInterrupted``, behind the request for the job's return if it was asked for. What the run
        goes on with is saved. Of several processes all have to call it."""
        if in_any(self._requeue is not None):
            self._go_back_into_the_queue()
        raise RunInterrupted(where)

    def _go_back_into_the_queue(self) -> None:
        of_submitit = {n: handler for n in REQUEUE_SIGNALS if of_another(handler := self._previous.get(n))}
        if of_submitit:
            self._restore()
            number, handler = of_submitit.popitem()
            handler(number, None)  # ends this process
        elif is_main():
            requeue_job()

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._restore()
        if in_any(self.interrupted):  # behind the last batch of the last validation: the run is not done
            self.saving.save(trainer)
            self.leave(f"stopped after step {trainer.global_step}")

    def on_exception(self, trainer: lightning.Trainer, module, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


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
