"""Lightning's ``Trainer`` from the settings, and how far its run is: bars on a terminal, lines in a log."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import lightning
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipmapper.host.progress import ProgressLines
from clipmapper.settings.schema import TrainerConfig
from clipmapper.training.checkpoint import DurableCheckpointIO
from clipmapper.training.launching import cluster
from clipmapper.training.processes import is_main, this_share


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


def build_trainer(
    settings: TrainerConfig,
    max_steps: int,
    folder: Path,
    logger: Logger | bool,
    callbacks: Sequence[Callback],
) -> lightning.Trainer:
    """For the processes that :func:`~clipmapper.training.launching.start_processes` has started."""
    averaging = [] if settings.ema_decay is None else [AveragedWeights(settings.ema_decay)]
    between = steps_between_validations(settings, max_steps)
    return lightning.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings),
        plugins=[DurableCheckpointIO(), *cluster()],
        precision=settings.precision,
        gradient_clip_val=settings.gradient_clip_val,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        max_steps=max_steps,
        # Lightning counts batches here, of which a step has several.
        val_check_interval=between * settings.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        logger=logger,
        callbacks=[*callbacks, *averaging],
        default_root_dir=folder,
        enable_checkpointing=False,  # interruption.py
        enable_model_summary=False,
        # Every process is given its share already.
        use_distributed_sampler=False,
    )


def steps_between_validations(settings: TrainerConfig, max_steps: int) -> int:
    """At most ``max_steps``."""
    return min(settings.val_check_interval or max_steps, max_steps)


def _strategy(settings: TrainerConfig) -> Strategy | str:
    if this_share().of == 1:
        return "auto"
    timeout = timedelta(minutes=settings.timeout_minutes)
    if settings.strategy == "fsdp2":
        return ModelParallelStrategy(this_share().of, 1, save_distributed_checkpoint=False, timeout=timeout)
    return DDPStrategy(
        timeout=timeout,
        broadcast_buffers=False,  # training changes none
        gradient_as_bucket_view=True,
        find_unused_parameters=True,  # the last block's text side in VQA, CLIP's logit scale
    )


class AveragedWeights(WeightAveraging):
    """Lightning's own averaging with torch's exponential moving average.

    ``EMAWeightAveraging`` computes decay · a + (1 − decay) · w, whose rounding would change frozen weights;
    this form, a + (1 − decay)(w − a), does not. Buffers are copied: masks, which hold −∞, have no average.

    Lightning puts the averages in for the batches of a validation; here they stay in for the callbacks behind
    the last batch, which explain the model. To be the last callback.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """See ``on_validation_start``."""

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """See ``on_validation_end``."""

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
