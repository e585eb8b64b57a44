"""The run behind ``scripts/train.py``: train, validate, explain, and say what came out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from clipmapper.config import TrainConfig
from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.models.build import load
from clipmapper.models.captioner import Captioner
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.cut_texts import cut_texts_said_once
from clipmapper.models.fine_tuning import merge_adapters
from clipmapper.training.checkpoint_files import NO_ROOM, previous_of, restore_checkpoint
from clipmapper.training.finite import StopAtNonFinite
from clipmapper.training.instances import built
from clipmapper.training.interruption import GracefulInterrupt, RunInterrupted
from clipmapper.training.less_noise import less_noise
from clipmapper.training.module import Labelled, StepBatches
from clipmapper.training.processes import (
    another_has_failed,
    check_shares,
    in_main,
    is_main,
    say_once,
    start_processes,
    this_share,
)
from clipmapper.training.progress import StepsBar
from clipmapper.training.run_folder import (
    CHECKPOINT,
    RESULTS,
    folder_to_resume,
    new_run_folder,
    run_of_requeued_job,
    write_json,
)
from clipmapper.training.run_logger import check_logger, logged_files, run_logger
from clipmapper.training.tables import console, files_table
from clipmapper.training.task import Task
from clipmapper.training.trainer import build_trainer, steps_between_validations


def train(config: TrainConfig, data: RecordData | None = None) -> Path:
    """Train with these settings; returns the run's folder. See the README for what is in it.

    ``data``: in place of the settings'; :func:`clipmapper.data.huggingface.records_of` makes it of an object.

    Raises ``UserError`` for settings that cannot work, before anything long begins, and where the run cannot
    go on (no room on the disk, a loss that is no number); and
    :class:`~clipmapper.training.interruption.RunInterrupted` when the user stops the run.
    """
    device = start_processes(config.trainer)
    try:
        with cut_texts_said_once(is_main()):
            return _train(config, device, data)
    except UserError as error:
        line = _without_traceback(str(error))
        if say_once(line):
            if line == str(error):
                raise
            raise UserError(line) from error
        raise SystemExit(2) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room to write ({error.strerror}): {error.filename or config.output}") from error
    except RunInterrupted:
        if is_main():
            raise
        raise SystemExit(0) from None  # the main process says it
    except RuntimeError as error:
        if another_has_failed():  # this one only waited for it in vain
            raise SystemExit(2) from error
        raise


def _train(config: TrainConfig, device: torch.device, data: RecordData | None) -> Path:
    began = time.monotonic()
    in_main(lambda: check_logger(config.logger))
    check_shares(config.training.batch_size, config.trainer.accumulate_grad_batches)
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    explainer = None if config.callbacks is None else built(asdict(config.callbacks))
    resumed = folder_to_resume(config.output, config.name, settings) if config.resume else None
    resumed = resumed or in_main(lambda: run_of_requeued_job(config.output, config.name))
    lightning.seed_everything(config.seed, verbose=False)
    described = None if data else asdict(config.data)
    data = data or built(described)
    task: Task = instantiate({"_target_": config.training._target_, "_partial_": True})(config, data)
    model = task.model
    if described:  # an object of the caller's can't be found again from a checkpoint
        model.description["data"] = described
    out = console()
    if resumed and (line := in_main(lambda: restore_checkpoint(resumed / CHECKPOINT))):
        out.print(line, soft_wrap=True)
    folder = resumed or in_main(lambda: new_run_folder(config.output, config.name, settings))
    out.print(f"{'Resuming' if resumed else 'Run'} {folder}")

    for line in _data_lines(data):
        out.print(line, markup=False)

    model.to(device)
    task.prepare(explainer, folder)
    with run_logger(config.logger, folder, config.name) if is_main() else nullcontext(False) as logger:
        with less_noise(), _stopping():
            trainer = _fit(config, task, explainer, logger, folder, resumed is not None)
            trainer.save_checkpoint(folder / CHECKPOINT)
        if not is_main():
            return folder
        _make_plain(model, folder / CHECKPOINT, sharded=config.trainer.strategy == "fsdp2")
        model.to(device)

        with torch.compiler.set_stance("force_eager"):
            found = task.results(trainer, folder)
        results: dict = {"name": config.name, "settings": settings, **found}
        scored = f"{task.validation_splits[0]}/{task.objective}"
        results["objective"] = {"name": scored, "value": float(trainer.callback_metrics[scored])}
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
    previous_of(folder / CHECKPOINT).unlink(missing_ok=True)  # the run is finished: nothing resumes it
    out.print(files_table(files))
    out.print(f"{results['seconds']:.0f} s in all")
    return folder


def _fit(
    config: TrainConfig,
    task: Task,
    explainer: Callback | None,
    logger: Logger | bool,
    folder: Path,
    resume: bool,
) -> lightning.Trainer:
    training = config.training
    checkpoint = folder / CHECKPOINT
    first_step = int(torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]) if resume else 0
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=checkpoint.parent,
            filename=checkpoint.stem,
            every_n_train_steps=config.trainer.checkpoint_interval,
            enable_version_counter=False,
        ),
        StopAtNonFinite(checkpoint),
        GracefulInterrupt(checkpoint),
        StepsBar(refresh_rate=20),
    ]
    if explainer is not None:
        callbacks.append(explainer)
    trainer = build_trainer(config.trainer, training.max_steps, folder, logger, callbacks)
    module = task.module()
    module.layer_decay = training.layer_decay
    if config.trainer.compile:
        module.compile_trained()
    share = this_share()
    batches = StepBatches(
        task.batch_at,
        first_step,
        training.max_steps,
        share,
        config.trainer.accumulate_grad_batches,
        module.terms,
    )
    # Forked, so that nothing is copied and batches need not be told how to travel.
    loading = {"num_workers": task.workers, "multiprocessing_context": "fork"} if task.workers else {}
    validation = [
        DataLoader(Labelled(task.labelled(name), share=share), batch_size=None, **loading)
        for name in task.validation_splits
    ]
    loader = DataLoader(batches, batch_size=None, **loading)
    trainer.fit(module, loader, validation, ckpt_path=checkpoint if resume else None, weights_only=True)
    # A run that was stopped in its last validation is resumed behind its last step: fit does nothing.
    unseen = f"{task.validation_splits[0]}/loss" not in trainer.callback_metrics
    if unseen or training.max_steps % steps_between_validations(config.trainer, training.max_steps):
        trainer.validate(module, validation, verbose=False)
    return trainer


def _make_plain(model: CLIPmapper | Captioner, checkpoint: Path, sharded: bool) -> None:
    """A trained model as :func:`clipmapper.load` gives it: whole, without adapters."""
    if not sharded or this_share().of == 1:
        merge_adapters(model.encoder)
        return
    for name, part in load(checkpoint).named_children():
        setattr(model, name, part)


def _without_traceback(message: str) -> str:
    """Torch puts the traceback of a DataLoader's worker into the message of what it raised there."""
    return message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()


def _data_lines(data) -> Iterator[str]:
    """What the data are; the built-in scenes are rendered here."""
    if isinstance(data, RecordData):
        yield from data.summary()
        return
    began = time.monotonic()
    images = sum(len(getattr(data, name).images) for name in data.sizes)
    rendering = time.monotonic() - began
    yield f"{images} scenes rendered in {rendering:.0f} s ({images / rendering:.0f} images/s)"


@contextmanager
def _stopping() -> Iterator[None]:
    """Lightning turns a Ctrl-C outside a training step into the end of the process: say it as ours."""
    try:
        yield
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise RunInterrupted("stopped after training, while validating") from leaving
        raise
