"""Lightning's ``Trainer`` from the settings."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import lightning
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipmapper.settings.schema import TrainerConfig
from clipmapper.training.checkpoint import DurableCheckpointIO
from clipmapper.training.launching import cluster
from clipmapper.training.processes import this_share


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
        enable_checkpointing=False,  # saving.py
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
