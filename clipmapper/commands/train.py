"""The run behind ``scripts/train.py``: train, validate, explain, and say what came out."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import lightning
import torch
from torch import nn

from clipmapper.commands.compose import told_of_init
from clipmapper.commands.train_fit import fit, interpolation_of, keep_what_was
from clipmapper.commands.train_folds import in_folds, train_folds
from clipmapper.commands.train_results import Trained, results_of
from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.host.outputs import check_folder
from clipmapper.host.stopping import forks_ignore_signals
from clipmapper.models.clip_weights import names_tokenizer
from clipmapper.models.encoder import merge_adapters
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.settings.checks import built
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.registry import load, task_named
from clipmapper.training.checkpoint import previous_of, read_encoder, restore_checkpoint, steps_of
from clipmapper.training.checkpoint_data import data_description
from clipmapper.training.endings import Unfinished, ending, give_up
from clipmapper.training.launching import less_noise, start_processes
from clipmapper.training.loggers import check_logger, logged_files, run_logger
from clipmapper.training.processes import check_shares, in_main, is_main, this_share
from clipmapper.training.retrieval import ClipRetrieval
from clipmapper.training.run_folder import (
    BEST,
    CHECKPOINT,
    INTERPOLATED,
    RESULTS,
    TAKEN,
    folder_to_resume,
    new_run_folder,
    only_one,
    run_of_requeued_job,
    write_json,
)
from clipmapper.training.shown import console, files_table
from clipmapper.training.steps import in_steps
from clipmapper.training.tuning import check_alone, found

_CHOOSE = {
    "captions": "experiment=caption_manifest, or training=captioning with a captioner as model",
    "questions": "training=vqa and a model that answers",
}


def train(config: TrainConfig, data: RecordData | None = None) -> Path:
    """Train with these settings; returns the run's folder. See the README for what is in it.

    With ``data.folds`` it is a folder of as many runs (:mod:`clipmapper.commands.train_folds`).

    ``data``: in place of the settings'; :func:`clipmapper.data.readers.huggingface.records_of` makes it of an
    object.

    Raises ``UserError`` for settings that cannot work, before anything long begins, and where the run cannot
    go on (no room on the disk, a loss that is no number); and
    :class:`~clipmapper.errors.RunInterrupted` when the user stops the run.
    """
    if data is None and in_folds(config):
        return train_folds(config, _train_one)
    return _train_one(config, data)


def _train_one(
    config: TrainConfig, data: RecordData | None = None, of_several: Callable[[], str] | None = None
) -> Path:
    """One run. ``of_several``: see :class:`~clipmapper.training.endings.Unfinished`."""
    with forks_ignore_signals():
        unfinished = Unfinished(config, of_several=of_several)
        try:
            device, unfinished.companions = start_processes(config.trainer)
            unfinished.companions.watch(lambda: give_up(unfinished))
            with ExitStack() as until_the_end:
                until_the_end.enter_context(cut_texts_said_once(is_main()))
                return _train(config, device, data, unfinished, until_the_end)
        except BaseException as error:
            end = ending(error, unfinished)
            if end is error:
                raise
            raise end from error
        finally:
            unfinished.companions.end()


def _train(
    config: TrainConfig,
    device: torch.device,
    data: RecordData | None,
    unfinished: Unfinished,
    until_the_end: ExitStack,
) -> Path:
    began = time.monotonic()
    in_main(lambda: check_logger(config.logger))
    check_alone(config)
    check_shares(config.training.batch_size, config.trainer.accumulate_grad_batches)
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    explainer = None if config.callbacks is None else built(asdict(config.callbacks))
    resumed = in_main(lambda: _resumed(config, settings))
    in_main(lambda: _check_outputs(config, resumed))
    if resumed:
        in_main(lambda: until_the_end.enter_context(only_one(resumed)))
        unfinished.folder = resumed
    lightning.seed_everything(config.seed, verbose=False)
    described = None if data else data_description(config.data)
    data = data or built(asdict(config.data))
    data.check_training("data")
    task = task_named(config.training.task)
    length = in_steps(config, data)
    config = length.config
    _check_frozen_steps(config)
    if data.kind != task.records:
        raise UserError(
            f"data: it has {data.kind} and no {task.records}, but training is for {task.name}; choose "
            f"{_CHOOSE[data.kind]}"
        )
    run = task.run(config, data)
    model = run.model
    if described:  # an object of the caller's can't be found again from a checkpoint
        model.description["data"] = described
    taken = None if resumed or config.init is None else run.take(_initial(config), config.init)
    out = console()
    if resumed:
        if line := in_main(lambda: restore_checkpoint(resumed / CHECKPOINT)):
            out.print(line, soft_wrap=True)
        read_encoder(resumed / CHECKPOINT, model)
    folder = resumed or in_main(lambda: new_run_folder(config.output, config.name, settings))
    if not resumed:
        in_main(lambda: until_the_end.enter_context(only_one(folder)))
        unfinished.folder = folder
        out.print(f"Run {folder}")
        if taken is not None and is_main():
            write_json(folder / TAKEN, taken.results())
    else:
        done = steps_of(folder / CHECKPOINT)
        out.print(f"Resuming {folder} after step {done} of {config.training.max_steps}")
        if config.init is not None:
            line = f"init={config.init} is not read again: the run goes on with its own weights"
            out.print(line, soft_wrap=True)
    told = [*data.summary(), *([] if taken is None else taken.lines())]
    for line in [*told, *([] if length.line is None else [length.line])]:
        out.print(line, soft_wrap=True)

    model.to(device)
    if explainer is not None:
        samples = task.samples(model, data, "validation", explainer.samples, explainer.seed)
        explainer.prepare(task, samples, folder / "pictures")
    run.prepare(folder)
    run.augment()
    for line in run.validated.lines():
        out.print(line)
    clip = None if config.encoder.frozen else ClipRetrieval(data, config.seed, folder)
    interpolation = interpolation_of(config, run, folder)
    if not resumed:
        in_main(lambda: keep_what_was(model.encoder, clip, interpolation))
    with run_logger(config.logger, folder, config.name) if is_main() else nullcontext(False) as logger:
        with less_noise():
            config = found(config, run, folder, resumed is not None)
            trainer, best = fit(config, run, explainer, logger, folder, resumed is not None, interpolation)
        unfinished.companions.end()
        if not is_main():
            return folder
        sharded = config.trainer.strategy == "fsdp2"
        kept = folder / (CHECKPOINT if best is None else BEST)
        if interpolation is not None and interpolation.chosen < 1:
            kept = folder / INTERPOLATED
        _make_plain(model, kept, config.encoder.architecture, sharded)
        model.to(device)

        trained = Trained(config, run, trainer, explainer, folder, kept, best, interpolation, clip)
        results, files = results_of(trained, settings)
    files |= logged_files(logger, folder)
    results["files"] = {what: str(path) for what, path in files.items()}
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(folder / RESULTS, results)
    for file in (CHECKPOINT, BEST):  # the run is finished: nothing resumes it
        previous_of(folder / file).unlink(missing_ok=True)
    out.print(files_table(files))
    out.print(f"{results['seconds']:.0f} s in all")
    return folder


def _initial(config: TrainConfig) -> nn.Module:
    """The model that ``init`` names."""
    own = config.encoder.architecture
    with told_of_init():
        return load(config.init, architecture=own if names_tokenizer(own) else None)


def _resumed(config: TrainConfig, settings: Mapping) -> Path | None:
    """The folder of the run to go on with; None where a new one is begun."""
    if config.resume:
        return folder_to_resume(config.output, config.name, settings, config.resume)
    return run_of_requeued_job(config.output, config.name)


def _check_outputs(config: TrainConfig, resumed: Path | None) -> None:
    """Before anything is read."""
    if resumed:
        check_folder(resumed, f"resume={config.resume}")
    else:
        check_folder(Path(config.output, config.name), f"output={config.output}")
    kept = config.training.token_cache_folder
    if kept is not None and config.training.token_cache:
        check_folder(Path(kept), f"training.token_cache_folder={kept}")


def _check_frozen_steps(config: TrainConfig) -> None:
    frozen, steps = config.encoder.frozen_steps, config.training.max_steps
    if not config.encoder.frozen and frozen >= steps:
        raise UserError(
            f"encoder.frozen_steps={frozen}: training ends behind {steps} steps, so that the encoder would "
            "never be trained; give fewer, or encoder.frozen=true"
        )


def _make_plain(model: nn.Module, checkpoint: Path, architecture: str, sharded: bool) -> None:
    """A trained model as :func:`clipmapper.load` gives it: whole, without adapters."""
    if not sharded or this_share().of == 1:
        merge_adapters(model.encoder)
        return
    own = architecture if names_tokenizer(architecture) else None
    for name, part in load(checkpoint, architecture=own).named_children():
        setattr(model, name, part)
