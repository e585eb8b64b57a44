"""The run behind ``scripts/perturb.py``: score explanation methods on a trained model."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from torch import nn

from clipmapper.commands.explain import chosen_device
from clipmapper.data.records import RecordData
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.perturbation import finished_chunks
from clipmapper.host.outputs import NO_ROOM, check_folder
from clipmapper.host.progress import progress
from clipmapper.models.exported import model_digest, model_path
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.settings.commands import PerturbConfig
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.run_folder import RESULTS, write_json
from clipmapper.training.shown import console, files_table
from clipmapper.training.task import Task

_PICTURES = 8
_PICTURES_FOLDER = "pictures"
# Settings that some tasks have.
_SOME_TASKS = ("explained", "word_maps", "word_weights", "caption_scores")


@cut_texts_said_once()
def perturb_checkpoint(config: PerturbConfig) -> Path:
    """Explain questions (captions) of the settings' data or of the checkpoint's own world, print the tables,
    write ``results.json`` and pictures.

    Finished chunks are kept in ``output/chunks``; with ``resume`` a run that was stopped takes them up again.
    """
    began = time.monotonic()
    check_folder(Path(config.output), f"output={config.output}")
    model = load(config.checkpoint, chosen_device(config.device), config.architecture)
    task = task_of(model)
    _options(config, task)
    task.check_explanation_scores(config.scores)
    data = data_for(task, model, config.data, config.checkpoint)
    numbers = explanation_scores(config, task, model, data)
    folder = Path(config.output)
    results = {"settings": asdict(config) | _options(config, task), "explanations": numbers}
    write_json(folder / RESULTS, results | {"seconds": round(time.monotonic() - began, 1)})
    console().print(files_table({"results": folder / RESULTS, "pictures": folder / _PICTURES_FOLDER}))
    return folder


def explanation_scores(config: PerturbConfig, task: Task, model: nn.Module, data: RecordData) -> dict:
    """The scores for ``results.json``, printed as well; pictures and chunks lie in ``output``."""
    options = _options(config, task)
    samples = task.samples(model, data, config.split, config.samples, config.seed)
    out = console()
    if line := samples.note():
        out.print(line)
    folder = Path(config.output)
    settings = asdict(config)
    digest = model_digest(model_path(config.checkpoint))
    depends = {k: v for k, v in settings.items() if k in ("methods", "samples", "split", "seed", "chunk")}
    depends |= options | {"data": settings["data"], "explained": samples.digest()}
    total = samples.points(len(config.methods), config.scores)
    chunks = folder / "chunks"
    if not config.resume and chunks.exists():
        for file in chunks.rglob("chunk_*.npz"):
            file.unlink()
    key = json.dumps({"checkpoint": digest, **depends}, sort_keys=True)
    try:
        with progress("perturbation, points of curves", total) as advance:
            report = task.report(
                model,
                samples,
                config.methods,
                chunk=config.chunk,
                batch_size=config.batch_size,
                seed=config.seed,
                scores=config.scores,
                folder=chunks,
                key=key,
                progress=advance,
                **options,
            )
    except KeyboardInterrupt as stop:
        raise RunInterrupted(_kept(chunks, key)) from stop
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room to write ({error.strerror}) in {folder}; {_kept(chunks, key)}") from error
    numbers = report.numbers(config.confidence, config.seed)
    count = min(_PICTURES, len(samples))
    report.write(folder / _PICTURES_FOLDER, count=count, confidence=config.confidence)
    for table in report.tables(numbers):
        out.print(table)
    return numbers


def _options(config: PerturbConfig, task: Task) -> dict:
    """The settings that some tasks have, with what this one takes where they are null; checked."""
    return task.report_settings({name: getattr(config, name) for name in _SOME_TASKS})


def _kept(chunks: Path, key: str) -> str:
    """Say what the next call need not compute again, as the disk has it."""
    done = finished_chunks(chunks, key)
    if not done:
        return "nothing was saved: no chunk was finished"
    return (
        f"{done} chunk{'s' if done > 1 else ''} saved in {chunks}: the same command with resume=true goes on"
    )
