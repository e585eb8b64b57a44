"""The run behind ``scripts/train.py``: train, validate, explain, and say what came out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from clipmapper.config import Section, TrainConfig
from clipmapper.errors import UserError
from clipmapper.training.interruption import GracefulInterrupt, RunInterrupted
from clipmapper.training.less_noise import less_noise
from clipmapper.training.module import Labelled, StepBatches
from clipmapper.training.run_folder import CHECKPOINT, RESULTS, folder_to_resume, new_run_folder, write_json
from clipmapper.training.run_logger import logged_files, run_logger
from clipmapper.training.tables import console, files_table
from clipmapper.training.task import Task


def train(config: TrainConfig) -> Path:
    """Train with these settings; returns the run's folder. See the README for what is in it.

    Raises ``UserError`` for settings that cannot work, before anything long begins, and
    :class:`~clipmapper.training.interruption.RunInterrupted` when the user stops the run.
    """
    began = time.monotonic()
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    explainer = None if config.callbacks is None else _built(config.callbacks)
    resumed = folder_to_resume(config.output, config.name, settings) if config.resume else None
    lightning.seed_everything(config.seed, verbose=False)
    data = _built(config.data)
    task: Task = instantiate({"_target_": config.training._target_, "_partial_": True})(config, data)
    model = task.model
    model.description["data"] = asdict(config.data)
    folder = resumed or new_run_folder(config.output, config.name, settings)
    out = console()
    out.print(f"{'Resuming' if resumed else 'Run'} {folder}")

    rendering = time.monotonic()
    images = sum(len(getattr(data, name).images) for name in data.sizes)
    rendering = time.monotonic() - rendering
    out.print(f"{images} scenes rendered in {rendering:.0f} s ({images / rendering:.0f} images/s)")

    trainer_device = _device(config)
    model.to(trainer_device)
    task.prepare(explainer, folder)
    with run_logger(config.logger, folder, config.name) as logger:
        with less_noise(), _stopping():
            trainer = _fit(config, task, explainer, logger, folder, resumed is not None)
            trainer.save_checkpoint(folder / CHECKPOINT)
        model.to(trainer_device)

        found = task.results(trainer, folder)
        results: dict = {"name": config.name, "settings": settings, **found}
        files = {"checkpoint": folder / CHECKPOINT, "results": folder / RESULTS}
        for table in task.tables(found):
            out.print(table)
        if explainer is not None and explainer.report is not None:
            results["explanations"] = explainer.report.numbers(explainer.confidence, explainer.seed)
            for table in explainer.kind.tables(results["explanations"]):
                out.print(table)
            files |= {"heat maps": folder / "pictures", "methods": folder / "pictures" / "methods.png"}
            files["perturbation curves"] = folder / "pictures" / explainer.kind.curves
    files |= logged_files(logger, folder)
    results["files"] = {what: str(path) for what, path in files.items()}
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(folder / RESULTS, results)
    out.print(files_table(files))
    out.print(f"{results['seconds']:.0f} s in all")
    return folder


def _fit(
    config: TrainConfig, task: Task, explainer: Callback | None, logger: Logger, folder: Path, resume: bool
) -> lightning.Trainer:
    training = config.training
    checkpoint = folder / CHECKPOINT
    first_step = int(torch.load(checkpoint, weights_only=True)["global_step"]) if resume else 0
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=checkpoint.parent,
            filename=checkpoint.stem,
            every_n_train_steps=config.trainer.checkpoint_interval,
            enable_version_counter=False,
        ),
        GracefulInterrupt(checkpoint),
        TQDMProgressBar(refresh_rate=20),
    ]
    if explainer is not None:
        callbacks.append(explainer)
    trainer = lightning.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        precision=config.trainer.precision,
        gradient_clip_val=config.trainer.gradient_clip_val,
        max_steps=training.max_steps,
        val_check_interval=min(config.trainer.val_check_interval or training.max_steps, training.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        logger=logger,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_model_summary=False,
    )
    module = task.module()
    batches = DataLoader(StepBatches(task.batch_at, first_step, training.max_steps), batch_size=None)
    validation = [
        DataLoader(Labelled(task.labelled(name)), batch_size=None) for name in task.validation_splits
    ]
    trainer.fit(module, batches, validation, ckpt_path=checkpoint if resume else None, weights_only=True)
    # A run that was stopped in its last validation is resumed behind its last step: fit does nothing.
    unseen = f"{task.validation_splits[0]}/loss" not in trainer.callback_metrics
    if unseen or training.max_steps % trainer.val_check_interval:
        trainer.validate(module, validation, verbose=False)
    return trainer


def _built(section: Section):
    """What the ``_target_`` of a section stands for."""
    try:
        return instantiate(asdict(section))
    except InstantiationException as error:
        # Hydra wraps what a constructor raises in an error of its own, with lines about where.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise


@contextmanager
def _stopping() -> Iterator[None]:
    """Lightning turns a Ctrl-C outside a training step into the end of the process: say it as ours."""
    try:
        yield
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise RunInterrupted("stopped after training, while validating") from leaving
        raise


def _device(config: TrainConfig) -> torch.device:
    accelerator = config.trainer.accelerator
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
