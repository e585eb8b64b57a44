"""The run behind ``scripts/study.py``: models × seeds × methods × scores, and one report of all."""

import time
from pathlib import Path

from clipmapper.commands.study_cells import finished_cell, worked_off
from clipmapper.commands.study_files import write_study
from clipmapper.commands.study_jobs import run_jobs
from clipmapper.commands.study_models import CellModel, is_part, run_settings, study_models
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.host.outputs import check_folder
from clipmapper.models.exported import model_path
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.settings.study import StudyConfig
from clipmapper.training.shown import console, files_table


@cut_texts_said_once()
def study(config: StudyConfig) -> Path:
    """Work off this call's part of the study; where all parts are there, write the report.

    A model that is finished with the same settings is not computed again. Raises ``UserError`` for settings
    that cannot work, before anything long begins, and ``RunInterrupted`` with what is kept.
    """
    began = time.monotonic()
    folder, out = Path(config.output), console()
    check_folder(folder, f"output={config.output}")
    cells = study_models(config)
    mine = [cell for cell in cells if is_part(config, cell)]
    _check(cells)
    left = [cell for cell in mine if not config.resume or finished_cell(config, cell) is None]
    for cell in mine:
        if cell not in left:
            out.print(f"{cell.name}: finished, {cell.folder}", soft_wrap=True)
    if not mine:
        raise UserError(f"only_seed={config.only_seed}: {config.only_model} is one model, of the first seed")
    try:
        if config.jobs > 1 and len(left) > 1:
            run_jobs(config, left)
        else:
            for cell in left:
                worked_off(config, cell)
    except RunInterrupted as stop:
        raise RunInterrupted(f"{stop}; {_kept(config, cells)}") from stop
    except KeyboardInterrupt as stop:
        raise RunInterrupted(f"stopped; {_kept(config, cells)}") from stop
    kept = {cell: finished_cell(config, cell) for cell in cells}
    missing = [cell.name for cell, found in kept.items() if found is None]
    if missing:
        out.print(
            f"{len(cells) - len(missing)} of {len(cells)} models are finished, not {', '.join(missing)}: the "
            "call that finishes the last of them, or one without only_model and only_seed, writes the report",
            soft_wrap=True,
        )
        return folder
    files = write_study(config, [found for found in kept.values() if found], time.monotonic() - began)
    out.print(files_table(files))
    return folder


def _check(cells: list[CellModel]) -> None:
    """That every model can be found or trained, before the first is."""
    for cell in cells:
        if cell.seed is not None:
            run_settings(cell)
        elif not model_path(cell.given).exists():
            raise UserError(f"models.{cell.model}={cell.given}: there is no such file, folder or model")


def _kept(config: StudyConfig, cells: list[CellModel]) -> str:
    """What the next call need not compute again, as the disk has it."""
    done = sum(finished_cell(config, cell) is not None for cell in cells)
    how = "" if config.resume else " with resume=true"
    return f"{done} of {len(cells)} models are finished: the same command{how} goes on"
