"""Training with Lightning, from the first step to the weights that are kept."""

from collections.abc import Sequence
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from clipmapper.models.encoder import ClipEncoder
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.batches import Labelled, StepBatches
from clipmapper.training.best import KeepBest
from clipmapper.training.checkpoint import check_resumable, check_same_model, steps_of
from clipmapper.training.interpolation import Interpolation
from clipmapper.training.interruption import DueValidation, GracefulInterrupt, SaveSteps, StopAtNonFinite
from clipmapper.training.processes import this_share
from clipmapper.training.retrieval import ClipRetrieval
from clipmapper.training.run_folder import BEST, CHECKPOINT, ENCODER_BEFORE, INTERPOLATED
from clipmapper.training.steps import TimeLeft
from clipmapper.training.task import TaskRun
from clipmapper.training.trainer import build_trainer, steps_between_validations, steps_progress


def fit(
    config: TrainConfig,
    run: TaskRun,
    explainer: Callback | None,
    logger: Logger | bool,
    folder: Path,
    resume: bool,
    interpolation: Interpolation | None,
) -> tuple[lightning.Trainer, KeepBest | None]:
    """The trainer behind its last validation, and what the best one was where there are several."""
    training = config.training
    checkpoint = folder / CHECKPOINT
    first_step = steps_of(checkpoint) if resume else 0
    between = steps_between_validations(config.trainer, training.max_steps)
    saving = SaveSteps(checkpoint, config.trainer.checkpoint_interval, between)
    callbacks: list[Callback] = [
        StopAtNonFinite(checkpoint),
        saving,
        GracefulInterrupt(saving),
        steps_progress(20),
        TimeLeft(),
    ]
    # What init begins with may be better on own data than all that comes of it.
    begun = config.init is not None and not training.world
    best = _keeping_best(config, run, folder / BEST) if begun or between < training.max_steps else None
    if best is not None:
        callbacks.append(best)
    if explainer is not None:
        callbacks.append(explainer)
    callbacks.append(DueValidation(between, first=config.init is not None and best is not None))
    trainer = build_trainer(config.trainer, training.max_steps, folder, logger, callbacks)
    module = run.module()
    module.layer_decay = training.layer_decay
    module.encoder_learning_rate = config.encoder.learning_rate
    module.frozen_steps = config.encoder.frozen_steps
    if resume:
        check_same_model(checkpoint, module)
        check_resumable(checkpoint, trainer, module, whole=config.trainer.strategy != "fsdp2")
    if config.trainer.compile:
        module.compile_trained()
    share = this_share()
    batches = StepBatches(
        run.batch_at,
        first_step,
        training.max_steps,
        share,
        config.trainer.accumulate_grad_batches,
        module.terms,
    )
    # Forked, so that nothing is copied and batches need not be told how to travel.
    loading = {"num_workers": run.workers, "multiprocessing_context": "fork"} if run.workers else {}
    validation = [
        DataLoader(Labelled(run.splits[name], share=share), batch_size=None, **loading)
        for name in run.validation_splits
    ]
    loader = DataLoader(batches, batch_size=None, **loading)
    try:
        trainer.fit(module, loader, validation, ckpt_path=checkpoint if resume else None, weights_only=True)
        # A run that was stopped in its last validation is resumed behind its last step: fit does nothing.
        behind = first_step == training.max_steps or training.max_steps % between
        if behind and not (best and best.stopped):
            trainer.validate(module, validation, verbose=False)
        trainer.save_checkpoint(checkpoint)
        others = best is not None and best.put_back(trainer, module)
        if interpolation is not None:
            kept = folder / (CHECKPOINT if best is None else BEST)
            others = _interpolated(interpolation, trainer, module, kept, validation, explainer, others)
        if others:
            trainer.validate(module, validation, verbose=False)
    finally:
        module.leave_validation()
    return trainer, best


def _keeping_best(config: TrainConfig, run: TaskRun, path: Path) -> KeepBest:
    return KeepBest(path, *_monitored(config, run), config.trainer.patience)


def _monitored(config: TrainConfig, run: TaskRun) -> tuple[str, str]:
    monitor = config.trainer.monitor or f"{run.validation_splits[0]}/{run.objective}"
    return monitor, config.trainer.mode or ("min" if monitor.endswith("loss") else "max")


def interpolation_of(config: TrainConfig, run: TaskRun, folder: Path) -> Interpolation | None:
    weights = config.encoder.interpolation
    if weights is None:
        return None
    return Interpolation(folder / ENCODER_BEFORE, weights, *_monitored(config, run))


def keep_what_was(
    encoder: ClipEncoder, clip: ClipRetrieval | None, interpolation: Interpolation | None
) -> None:
    """Of an encoder that is to be trained."""
    if clip is not None:
        clip.before(encoder)
    if interpolation is not None:
        interpolation.keep(encoder)


def _interpolated(
    interpolation: Interpolation,
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    kept: Path,
    validation: Sequence[DataLoader],
    explainer: Callback | None,
    others: bool,
) -> bool:
    """Choose among weights between; whether those that are in now are to be validated and explained.

    What is tried is neither logged nor explained. ``others``: the weights of ``kept`` are not those that were
    validated last.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks = [callback for callback in callbacks if callback is not explainer]
    trainer.loggers = []

    def validate() -> None:
        trainer.validate(module, validation, verbose=False)

    try:
        chosen = interpolation.choose(trainer, module, kept, validate, kept.with_name(INTERPOLATED.name))
        if chosen == 1 and not others:  # explained already
            validate()
            return False
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
    return True
