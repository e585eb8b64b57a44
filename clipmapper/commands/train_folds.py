"""A run for each part of the data, which validates on it and trains on the others (k-fold cross-validation).

Stone 1974; as in Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, §7.10.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree

import numpy as np
from rich.table import Table

from clipmapper.errors import UserError
from clipmapper.host.outputs import check_folder
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.registry import task_named
from clipmapper.training.launching import started_by
from clipmapper.training.run_folder import (
    RESULTS,
    finished_run,
    folds_to_resume,
    new_run_folder,
    newest_run,
    of_folds,
    only_one,
    run_of_requeued_job,
    saved_step,
    write_json,
)
from clipmapper.training.shown import console, files_table


def in_folds(config: TrainConfig) -> bool:
    """Whether these settings ask for a run for each part of the data."""
    return getattr(config.data, "folds", None) is not None and config.data.fold is None


def train_folds(config: TrainConfig, train: Callable[..., Path]) -> Path:
    """Train on the parts one after the other; returns the folder with all of the runs, whose ``results.json``
    has the mean of every score of validation and its standard deviation over the runs.

    ``train(config, None, way_on)`` trains once. With ``resume`` finished runs are left as they are, and the
    one that was stopped goes on. Raises ``UserError`` where several processes are to share a run.
    """
    began = time.monotonic()
    folds = config.data.folds
    started = started_by()
    if config.trainer.devices != "1" or config.trainer.num_nodes != 1 or (started and started.count > 1):
        raise UserError(
            f"data.folds={folds}: one process trains them one after the other; give trainer.devices=1 and "
            f"trainer.num_nodes=1, or a command for each with data.fold, 1 to {folds}"
        )
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    resumed = run_of_requeued_job(config.output, config.name, of_folds)
    if config.resume:
        resumed = folds_to_resume(config.output, config.name, settings, config.resume)
    check_folder(resumed or Path(config.output, config.name), f"output={config.output}")
    folder = resumed or new_run_folder(config.output, config.name, settings, folds)
    with only_one(folder), _not_left_empty(folder):
        runs = _runs(config, settings, folder, train)
        results = _together(config, runs) | {"settings": settings}
        console().print(_table(results))
        results["seconds"] = round(time.monotonic() - began, 1)
        write_json(folder / RESULTS, results)
    console().print(files_table({"results": folder / RESULTS}))
    return folder


def _runs(config: TrainConfig, settings: Mapping, folder: Path, train: Callable[..., Path]) -> list[Path]:
    """A finished run for each part."""
    folds, out = config.data.folds, console()
    runs: list[Path] = []

    def way_on() -> str:
        return _way_on(config, settings, folder, len(runs))

    for number in range(1, folds + 1):
        part = deepcopy(config)
        part.output, part.name, part.data.fold = str(folder), f"{config.name}_fold_{number}", number
        done = finished_run(folder / part.name)
        if done is None:
            out.print(f"part {number} of {folds}, in {folder}", soft_wrap=True)
            begun = newest_run(folder / part.name)
            part.resume = False if begun is None else str(begun)
            done = train(part, None, way_on)
        else:
            out.print(f"part {number} of {folds}: finished, {done}", soft_wrap=True)
        runs.append(done)
    return runs


@contextmanager
def _not_left_empty(folder: Path) -> Iterator[None]:
    """Take the folder away where an error comes before the first of its runs has begun."""
    try:
        yield
    except BaseException:
        if not any(one.is_dir() for one in folder.iterdir()):
            rmtree(folder)
        raise


def _way_on(config: TrainConfig, settings: Mapping, folder: Path, done: int) -> str:
    """How to go on with all runs, as the disk has them at this moment."""
    begun = newest_run(folder / f"{config.name}_fold_{done + 1}")
    steps = 0 if begun is None else saved_step(begun)
    if not done and not steps:
        return "nothing was saved: there is nothing to resume"
    resume: bool | str = True
    try:
        if folds_to_resume(config.output, config.name, settings) != folder:
            resume = str(folder)
    except UserError:
        resume = str(folder)
    more = f", and {steps} steps of the next are saved" if steps else ""
    how = "true" if resume is True else resume
    return (
        f"{done} of {config.data.folds} runs are finished{more}: the same command with resume={how} goes on"
    )


def _together(config: TrainConfig, runs: Sequence[Path]) -> dict:
    """For ``results.json``."""
    found = [json.loads((run / RESULTS).read_text()) for run in runs]
    task = task_named(config.training.task)
    of_each = [task.validation_scores(one) for one in found]
    titles = dict.fromkeys(title for scores in of_each for title in scores)
    scores = {}
    for title in titles:
        told = [one.get(title, (None, 1)) for one in of_each]
        scores[title] = _spread([value for value, _ in told]) | {"factor": max(factor for _, factor in told)}
    objective = _spread([one["objective"]["value"] for one in found])
    return {
        "name": config.name,
        "folds": [
            {
                "fold": number,
                "folder": str(run),
                "objective": one["objective"]["value"],
                "best": one.get("best"),
            }
            for number, (run, one) in enumerate(zip(runs, found, strict=True), 1)
        ],
        "objective": {"name": found[0]["objective"]["name"], "value": objective["mean"], **objective},
        "scores": scores,
    }


def _spread(values: Sequence[float | None]) -> dict:
    """Mean and sample standard deviation of those that are there; None where there are none, or one."""
    there = np.array([value for value in values if value is not None])
    return {
        "mean": float(there.mean()) if len(there) else None,
        "standard deviation": float(there.std(ddof=1)) if len(there) > 1 else None,
        "values": list(values),
    }


def _table(results: Mapping) -> Table:
    count = len(results["folds"])
    table = Table(
        title=f"Validation on {count} parts, each by a run that did not see it", title_justify="left"
    )
    for column in ("of", "mean", "standard deviation", *(f"part {number}" for number in range(1, count + 1))):
        table.add_column(column, justify="left" if column == "of" else "right")
    for title, row in results["scores"].items():
        numbers = [row["mean"], row["standard deviation"], *row["values"]]
        digits = 1 if row["factor"] == 100 else 2
        cells = ["" if value is None else f"{row['factor'] * value:.{digits}f}" for value in numbers]
        table.add_row(title.replace("_", " "), *cells, style="bold" if title == "overall" else None)
    return table
