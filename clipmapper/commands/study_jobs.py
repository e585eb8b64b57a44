"""Several models of a study at a time, each in a process of its own."""

import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from clipmapper.commands.study_cells import worked_off
from clipmapper.commands.study_models import CellModel
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.host.stopping import a_command
from clipmapper.settings.study import StudyConfig
from clipmapper.training.shown import console

LOG = "log.txt"
_PATIENCE = 60.0  # seconds in which a process that was told to stop saves and ends


def run_jobs(config: StudyConfig, cells: Sequence[CellModel]) -> None:
    """Work off the cells, ``jobs`` at a time; what they print goes to ``log.txt`` in each one's folder.

    The first that fails or is interrupted stops the others, which keep what they have. Raises what that one
    said: ``UserError`` or ``RunInterrupted``.
    """
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.jobs)
    # As a fresh process, for torch's threads don't outlive a fork; and read before torch is imported.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    waiting, running = list(cells), {}
    try:
        while waiting or running:
            while waiting and len(running) < config.jobs:
                cell = waiting.pop(0)
                process, answer = _started(replace(config, jobs=1, threads=threads), cell)
                running[process.sentinel] = (process, answer, cell)
                console().print(f"{cell.name}: {cell.folder / LOG}", soft_wrap=True)
            for sentinel in wait(list(running)):
                process, answer, cell = running.pop(sentinel)
                process.join()
                _raise_what_it_said(process, answer, cell)
                console().print(f"{cell.name}: finished")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        _stop([process for process, _, _ in running.values()])


def _started(config: StudyConfig, cell: CellModel) -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")
    answer, speaks = context.Pipe(duplex=False)
    process = context.Process(target=_worked_off, args=(config, cell, speaks))
    process.start()
    speaks.close()
    return process, answer


def _worked_off(config: StudyConfig, cell: CellModel, answer: Connection) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            with a_command():
                worked_off(config, cell)
        except UserError as error:
            answer.send(("mistake", str(error)))
        except (RunInterrupted, KeyboardInterrupt) as stop:
            answer.send(("stopped", str(stop) or f"{cell.name}: stopped"))


def _raise_what_it_said(process: BaseProcess, answer: Connection, cell: CellModel) -> None:
    try:
        kind, line = answer.recv() if answer.poll() else (None, "")
    except EOFError:  # it has ended without a word
        kind, line = None, ""
    if kind == "stopped":
        raise RunInterrupted(line)
    if kind == "mistake":
        raise UserError(line)
    if process.exitcode:
        raise UserError(f"{cell.name}: its process ended ({process.exitcode}); {cell.folder / LOG} says more")


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
