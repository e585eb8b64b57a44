"""Runs that end before their end: one line that says why, and what the disk has of them."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from lightning.fabric.plugins.environments import SLURMEnvironment

from clipmapper.errors import RunCutShort, RunInterrupted, UserError
from clipmapper.host.outputs import NO_ROOM
from clipmapper.host.stopping import Stopped
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.interruption import REQUEUE_SIGNALS, requeue_job
from clipmapper.training.memory import memory_line, out_of_memory
from clipmapper.training.processes import Companions, another_has_failed, is_main, say_once
from clipmapper.training.run_folder import CHECKPOINT, RESULTS, folder_to_resume, saved_step

_ALONE = "the run can't go on without it"
_OF_OTHERS = 3.0  # seconds in which the system tells of a process whose connection is gone


@dataclass
class Unfinished:
    """A run that has not come to its end. ``folder``: its own, once there is one. ``of_several``: of one that
    is for a part of the data, says how to go on with all of them."""

    config: TrainConfig
    folder: Path | None = None
    companions: Companions = field(default_factory=Companions)
    of_several: Callable[[], str] | None = None

    @property
    def output(self) -> str:
        """Where the settings say that its folder is to be."""
        return self.config.output

    @property
    def patience(self) -> str:
        """How long one of several processes waits for another, and which setting says so."""
        return f"{self.config.trainer.timeout_minutes:g} minutes (trainer.timeout_minutes)"

    def way_on(self) -> str:
        """How to go on with the run, as the disk has it at this moment."""
        if self.of_several is not None:
            return self.of_several()
        if self.folder is None:
            return "nothing was begun"
        if (self.folder / RESULTS).exists():
            return f"the run is finished: {self.folder / RESULTS}"
        step = saved_step(self.folder)
        if step is None:
            return "nothing was saved: there is nothing to resume"
        how = self._named_by()
        if how is None:
            return f"{step} steps are saved in {self.folder / CHECKPOINT}, but nothing can go on with them"
        return f"{step} steps are saved: the same command with resume={how} goes on"

    def _named_by(self) -> str | None:
        """The value of ``resume`` that resuming will take for this run, tried; None if it refuses any."""
        settings = {key: value for key, value in asdict(self.config).items() if key != "resume"}
        for resume in (True, str(self.folder)):
            with suppress(UserError):
                if folder_to_resume(self.config.output, self.config.name, settings, resume) == self.folder:
                    return str(resume).lower() if resume is True else resume
        return None


def ending(error: BaseException, run: Unfinished) -> BaseException:
    """Turn what ended a run into what it raises: ``UserError`` or :class:`RunInterrupted` with the line, and
    ``SystemExit`` where another process has that to say. What nobody foresaw is raised as it is.

    Processes that this one has started are ended, but not where all stop together.
    """
    # Lightning turns Ctrl-C into the end of the process.
    stopped = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(stopped, RunInterrupted | KeyboardInterrupt):
        return _interrupted(stopped, run)
    line = _line(error, run)
    speaks = line is not None and say_once(line)
    if line is None and isinstance(error, RuntimeError) and (lost := _of_other_processes(error, run)):
        line, speaks = lost
    run.companions.kill_own()
    if line is None:
        return error
    if not speaks:
        return SystemExit(2)
    return error if isinstance(error, UserError) and line == str(error) else UserError(line)


def killed_worker(error: RuntimeError) -> str | None:
    """The line for a worker of a DataLoader that was ended by somebody else; None for another error."""
    worker = re.search(
        r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited unexpectedly)", str(error)
    )
    if worker is None:
        return None
    how = f"was killed ({worker[1]})" if worker[1] else "has ended unexpectedly"
    return f"a process that makes batches {how}; where memory was short, fewer of them (workers) need less"


def give_up(run: Unfinished) -> NoReturn:
    """End this process, which waits for one that is gone, from another thread."""
    missing = run.companions.missing()
    if run.companions.is_first_left():
        print(f"error: {missing}; {_ALONE}. {run.way_on()}", file=sys.stderr, flush=True)
    run.companions.kill_own()
    os._exit(2)


def _interrupted(stopped: BaseException, run: Unfinished) -> BaseException:
    if not is_main():
        return SystemExit(0)  # the main process says it
    asked = isinstance(stopped, Stopped) and stopped.number in REQUEUE_SIGNALS
    if asked and SLURMEnvironment.detect():
        requeue_job()
    where = str(stopped) or "stopped at once"
    return RunInterrupted(f"{where}; {run.way_on()}")


def _line(error: BaseException, run: Unfinished) -> str | None:
    if isinstance(error, RunCutShort):
        return f"{error}. {run.way_on()}"
    if isinstance(error, UserError):
        line = _without_traceback(str(error))
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_ROOM
        return f"{line}. {run.way_on()}" if full else line
    if isinstance(error, OSError):
        if error.errno in NO_ROOM:
            where = error.filename or run.output
            return f"no room to write ({error.strerror}): {where}. {run.way_on()}"
        if run.folder is not None and error.filename and _within(Path(error.filename), run.folder):
            return f"{error.filename}: can't be written or read ({error.strerror}). {run.way_on()}"
    if out_of_memory(error):
        return f"{memory_line(run.config)}. {run.way_on()}"
    if isinstance(error, RuntimeError) and (line := killed_worker(error)):
        return f"{line}. {run.way_on()}"
    return None


def _of_other_processes(error: RuntimeError, run: Unfinished) -> tuple[str, bool] | None:
    """The line for what others have done to this process, and whether it is for this one to say."""
    held = run.companions.stopped()
    if held or "imed out" in str(error):
        line = f"{held or 'another process'}: no answer for {run.patience}; {_ALONE}. {run.way_on()}"
        return line, run.companions.is_first_left()
    missing = run.companions.missing(_OF_OTHERS)
    if not run.companions.without_main() and another_has_failed():
        return "", False  # it has said why
    if missing is not None:
        return f"{missing}; {_ALONE}. {run.way_on()}", run.companions.is_first_left()
    if re.search(r"onnection (closed|reset)|roken pipe", str(error)):
        reason = str(error).splitlines()[0]
        return f"the connection to another process is lost ({reason}); {_ALONE}. {run.way_on()}", is_main()
    return None


def _within(path: Path, folder: Path) -> bool:
    return folder.absolute() in path.absolute().parents


def _without_traceback(message: str) -> str:
    """Torch puts the traceback of a DataLoader's worker into the message of what it raised there."""
    return message.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
