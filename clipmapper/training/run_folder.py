"""Where a run puts what it writes, and how it finds it again."""

import errno
import fcntl
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml

from clipmapper.errors import UserError, visible
from clipmapper.host.outputs import write_whole
from clipmapper.settings.keys import GONE, name_today
from clipmapper.training.checkpoint import previous_of, steps_of
from clipmapper.training.processes import this_share

CHECKPOINT = Path("checkpoints") / "last.ckpt"
BEST = CHECKPOINT.with_name("best.ckpt")  # the weights of the best validation
INTERPOLATED = CHECKPOINT.with_name("interpolated.ckpt")  # those, with part of the encoder's from before
ENCODER_BEFORE = CHECKPOINT.with_name("encoder_before.ckpt")  # what the encoder began with, to interpolate
CONFIG = "config.yaml"
RESULTS = "results.json"
JOB = "slurm_job"
NUMBER = "number"
PROCESSES = "processes"
CLIP_BEFORE = "clip_before.json"  # how the encoder retrieved when it began
FOLDS = "folds"  # of how many runs, one for each part of the data, a folder is
FOUND = "found.json"  # by trainer.find_batch_size and trainer.find_learning_rate
TAKEN = "init.json"  # what was taken of the model that the run began with
_DEPTH = 20  # of what is nested in a file of settings

# Settings that say where and how long, what is looked at first, what to do about an image that it stopped at,
# and (of runs from before there was a choice) how maps of words are averaged: a run may go on with others.
_FREE = (
    "output",
    "init",
    "trainer.timeout_minutes",
    "data.check",
    "data.on_bad_image",
    "callbacks.word_maps",
)
# What runs did that were begun before there was such a setting.
_BEFORE = {
    "init": None,
    "encoder.frozen_steps": 0,
    "encoder.learning_rate": None,
    "encoder.interpolation": None,
    "training.max_epochs": None,
    "training.warmup_share": None,
    "trainer.monitor": None,
    "trainer.mode": None,
    "trainer.patience": None,
    "trainer.find_batch_size": False,
    "trainer.find_learning_rate": False,
    "training.validation_samples": None,
    "data.decoding": "exact",
    "data.validation_path": None,
    "data.augment": "none",
    "data.folds": None,
    "data.fold": None,
    "training.balance": "none",
    "training.questions_per_image": 1,
    "callbacks.explained": None,
    "callbacks.scores": ["removal"],
}


def new_run_folder(output: str, name: str, settings: Mapping, folds: int | None = None) -> Path:
    """``output/name/date_time`` with the run's settings in it. ``folds``: of how many runs it is to be."""
    place = Path(output) / name
    number = max((_number(run) for run in _runs(place)), default=0) + 1
    begun = folder = place / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for again in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run of this second, or of one that a clock has shown twice
            folder = begun.with_name(f"{begun.name}+{again}")
    if folds is None:
        (folder / CHECKPOINT.parent).mkdir()
    else:
        (folder / FOLDS).write_text(str(folds))
    (folder / NUMBER).write_text(str(number))
    (folder / PROCESSES).write_text(str(this_share().of))
    (folder / CONFIG).write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    if job := _slurm_job():
        (folder / JOB).write_text(job)
    return folder


def of_folds(folder: Path) -> bool:
    """Whether a folder is of several runs, one for each part of the data."""
    return (folder / FOLDS).is_file()


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / file).exists() for file in (CHECKPOINT, previous_of(CHECKPOINT)))


def run_of_requeued_job(
    output: str, name: str, kind: Callable[[Path], bool] = _has_checkpoint
) -> Path | None:
    """The unfinished run that this SLURM job had begun before it went back into the queue, if it saved.
    ``kind``: which folders can be of such a run."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return None
    for folder in _newest_first(Path(output, name)):
        note = folder / JOB
        of_this_job = note.is_file() and note.read_text() == _slurm_job()
        if of_this_job and kind(folder) and not (folder / RESULTS).exists():
            return folder
    return None


def _slurm_job() -> str | None:
    """Which job this is, the same when it is started again. Jobs of an array differ by their task."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    return None if job is None else f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}"


def folder_to_resume(output: str, name: str, settings: Mapping, resume: bool | str = True) -> Path:
    """The newest run of that name that left a checkpoint, or the one that ``resume`` names.

    Raises ``UserError`` where resuming makes no sense. A run goes on with the settings that it was started
    with; others need a run of their own.
    """
    folder = newest_run(Path(output, name)) if resume is True else Path(resume)
    if folder is None:
        raise UserError(
            f"resume=true: no run with a checkpoint in {Path(output, name)}; start one without it"
        )
    said = f"resume={'true' if resume is True else resume}"
    if resume is not True:
        if not (folder / CONFIG).is_file():
            raise UserError(f"{said}: not true, not false and not the folder of a run (there is no {CONFIG})")
        if not _has_checkpoint(folder):
            raise UserError(f"{said}: that run has left no checkpoint; start a new one without it")
    if (folder / RESULTS).exists():
        which = f"the newest run, {folder}," if resume is True else "that run"
        others = [run for run in _newest_first(folder.parent) if _can_go_on(run)]
        way_on = f"resume={others[0]} goes on with the last that is not" if others else "start a new one"
        raise UserError(f"{said}: {which} is finished; {way_on}{'' if others else ' without it'}")
    _check_settings(folder, settings, said)
    _check_processes(folder, said)
    return folder


def folds_to_resume(output: str, name: str, settings: Mapping, resume: bool | str = True) -> Path:
    """The newest folder of that name that is of several runs, or the one that ``resume`` names; errors as of
    :func:`folder_to_resume`."""
    said = f"resume={'true' if resume is True else resume}"
    if resume is True:
        folder = next(filter(of_folds, _newest_first(Path(output, name))), None)
        if folder is None:
            raise UserError(
                f"resume=true: no runs on parts of the data (data.folds) in {Path(output, name)}; "
                "start them without it"
            )
    else:
        folder = Path(resume)
        if not (of_folds(folder) and (folder / CONFIG).is_file()):
            raise UserError(f"{said}: not true, not false and not the folder of runs on parts of the data")
    if (folder / RESULTS).exists():
        raise UserError(f"{said}: {folder} is finished; start a new one without it")
    _check_settings(folder, settings, said)
    return folder


def _check_settings(folder: Path, settings: Mapping, said: str) -> None:
    before, now = _flat(_settings_of(folder, said)), _flat(settings)
    before = {key: value for key, value in _BEFORE.items() if key in now} | {
        key: name_today(value) for key, value in before.items() if key not in GONE
    }
    missing = object()  # None is a value: callbacks=none turns a section into one
    changed = [
        key for key in now | before if key not in _FREE and before.get(key, missing) != now.get(key, missing)
    ]
    if changed:
        was = f" ({json.dumps(before[changed[0]], default=str)[:200]})" if changed[0] in before else ""
        raise UserError(
            f"{said}: {changed[0]} is not what {folder} was started with{was}; "
            "resume with the same settings or start a new run"
        )


def _check_processes(folder: Path, said: str) -> None:
    """``trainer.devices=auto`` is another number of them on another machine, and so are a step's samples."""
    note, now = folder / PROCESSES, this_share().of
    before = note.read_text().strip() if note.is_file() else str(now)
    if before != str(now):
        raise UserError(
            f"{said}: {folder} was started with {visible(before[:20])} processes (trainer.devices × "
            f"trainer.num_nodes), these are {now}; resume it with as many or start a new run"
        )


def finished_run(place: Path) -> Path | None:
    """The newest run in ``place`` that has results."""
    return next((run for run in _newest_first(place) if (run / RESULTS).exists()), None)


def newest_run(place: Path) -> Path | None:
    """The run that was started last of those in ``place`` that left a checkpoint: what resume=true takes."""
    return next(filter(_has_checkpoint, _newest_first(place)), None)


def saved_step(folder: Path) -> int | None:
    """How many steps the checkpoint of a run holds that can be read; None where there is none."""
    for file in (CHECKPOINT, previous_of(CHECKPOINT)):
        if (step := steps_of(folder / file)) is not None:
            return step
    return None


def _newest_first(place: Path) -> list[Path]:
    return sorted(_runs(place), key=lambda run: (_number(run), *_age(run.name)), reverse=True)


def _runs(place: Path) -> list[Path]:
    return [file.parent for file in place.glob(f"*/{CONFIG}")]


def _number(folder: Path) -> int:
    """How many runs of its name had begun with it, which no clock can change; 0 where that was not noted."""
    try:
        return int((folder / NUMBER).read_text())
    except (OSError, ValueError):
        return 0


def _age(name: str) -> tuple[str, int, str]:
    """``…+9`` comes before ``…+20``."""
    begun, _, again = name.partition("+")
    return begun, int(again) if again.isdecimal() else 1, name


def _can_go_on(folder: Path) -> bool:
    return _has_checkpoint(folder) and not (folder / RESULTS).exists()


def _settings_of(folder: Path, said: str) -> Mapping:
    """Read the settings that the run was started with. Raises ``UserError`` where its file is none of ours.

    ``said``: how the user asked for that run.
    """
    file = folder / CONFIG
    try:
        text = file.read_text(encoding="utf-8")
        _check_events(yaml.parse(text))
        settings = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{said}: {file}: {error.strerror}; start a new run without it") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{said}: {file}: no settings of a run ({reason}); start a new run without it"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{said}: {file}: no settings of a run; start a new run without it")
    return settings


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Raise ``ValueError`` for YAML of another kind than we write.

    An alias can stand for any amount of text, by aliases of aliases, and what is nested deep takes long.
    """
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEPTH:
            raise ValueError("it has aliases, or is nested too deep")


def objective(folder: Path) -> float | None:
    """Read the score of a finished run, of which a sweep wants the highest; None without results."""
    results = folder / RESULTS
    return json.loads(results.read_text())["objective"]["value"] if results.exists() else None


def write_json(path: Path, content: Mapping) -> None:
    """Complete or not at all."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _flat(settings: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_LOCK = "running"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises ``UserError`` where another process is within already.

    The system forgets the lock with its process, however that ends. A file system without locks has none.
    """
    # Not flock: workers that are forked would have the lock as well, and may outlive this process a little.
    path = folder / _LOCK
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder}: a run is running there already ({file.read().strip()})"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
