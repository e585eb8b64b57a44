"""Where a run puts what it writes, and how it finds it again."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import yaml

from clipmapper.errors import UserError
from clipmapper.training.checkpoint_files import previous_of

CHECKPOINT = Path("checkpoints") / "last.ckpt"
CONFIG = "config.yaml"
RESULTS = "results.json"
JOB = "slurm_job"

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
    before, now = _flat(yaml.safe_load((folder / CONFIG).read_text())), _flat(settings)
    missing = object()  # None is a value: callbacks=none turns a section into one
    changed = [
        key for key in now | before if key not in _FREE and before.get(key, missing) != now.get(key, missing)
    ]
    if changed:
        was = f" ({json.dumps(before[changed[0]])})" if changed[0] in before else ""
        raise UserError(
            f"resume=true: {changed[0]} is not what {folder} was started with{was}; "
            "resume with the same settings or start a new run"
        )
    return folder


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
            flat[prefix + key] = value
    return flat
