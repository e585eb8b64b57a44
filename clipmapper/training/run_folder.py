"""Where a run puts what it writes, and how it finds it again."""

import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

import yaml

from clipmapper.errors import UserError
from clipmapper.training.checkpoint_files import previous_of

CHECKPOINT = Path("checkpoints") / "last.ckpt"
CONFIG = "config.yaml"
RESULTS = "results.json"
JOB = "slurm_job"
_DEPTH = 20  # of what is nested in a file of settings

# Settings that a run may go on with others of: what to do about an image that it stopped at.
_FREE = ("data.on_bad_image",)


def new_run_folder(output: str, name: str, settings: Mapping) -> Path:
    """``output/name/date_time`` with the run's settings in it."""
    folder = Path(output) / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{folder.name.split('+')[0]}+{number}")
    (folder / CHECKPOINT.parent).mkdir(parents=True)
    (folder / CONFIG).write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    if job := _slurm_job():
        (folder / JOB).write_text(job)
    return folder


def run_of_requeued_job(output: str, name: str) -> Path | None:
    """The unfinished run that this SLURM job had begun before it went back into the queue, if it saved."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return None
    for note in sorted(Path(output, name).glob(f"*/{JOB}"), reverse=True):
        folder = note.parent
        saved = any((folder / file).exists() for file in (CHECKPOINT, previous_of(CHECKPOINT)))
        if note.read_text() == _slurm_job() and saved and not (folder / RESULTS).exists():
            return folder
    return None


def _slurm_job() -> str | None:
    """Which job this is, the same when it is started again. Jobs of an array differ by their task."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    return None if job is None else f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}"


def folder_to_resume(output: str, name: str, settings: Mapping) -> Path:
    """The newest run of that name that left a checkpoint. Raises ``UserError`` where resuming makes no sense.

    A run goes on with the settings that it was started with; others need a run of their own.
    """
    files = (CHECKPOINT, previous_of(CHECKPOINT))
    found = {path.parent.parent for file in files for path in Path(output, name).glob(f"*/{file}")}
    runs = sorted(found, reverse=True)
    if not runs:
        raise UserError(
            f"resume=true: no run with a checkpoint in {Path(output, name)}; start one without it"
        )
    folder = runs[0]
    if (folder / RESULTS).exists():
        raise UserError(f"resume=true: the newest run, {folder}, is finished; start a new one without it")
    before, now = _flat(_settings_of(folder)), _flat(settings)
    missing = object()  # None is a value: callbacks=none turns a section into one
    changed = [
        key for key in now | before if key not in _FREE and before.get(key, missing) != now.get(key, missing)
    ]
    if changed:
        was = f" ({json.dumps(before[changed[0]], default=str)[:200]})" if changed[0] in before else ""
        raise UserError(
            f"resume=true: {changed[0]} is not what {folder} was started with{was}; "
            "resume with the same settings or start a new run"
        )
    return folder


def _settings_of(folder: Path) -> Mapping:
    """What the run was started with. Raises ``UserError`` where its file is none of ours."""
    file = folder / CONFIG
    try:
        text = file.read_text(encoding="utf-8")
        _check_events(yaml.parse(text))
        settings = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"resume=true: {file}: {error.strerror}; start a new run without it") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"resume=true: {file}: no settings of a run ({reason}); start a new run without it"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"resume=true: {file}: no settings of a run; start a new run without it")
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
    """What a sweep looks for the highest of, of a finished run; None of a process that writes no results."""
    results = folder / RESULTS
    return json.loads(results.read_text())["objective"]["value"] if results.exists() else None


def write_json(path: Path, content: Mapping) -> None:
    """Complete or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _flat(settings: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
