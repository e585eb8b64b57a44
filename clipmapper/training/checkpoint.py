"""Checkpoint files that survive a crash: complete or not there, and the one before is kept."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from clipmapper.errors import RunCutShort, UserError
from clipmapper.host.outputs import NO_ROOM
from clipmapper.models.weight_files import (
    Unreadable,
    check_finite,
    check_sizes,
    check_tensors,
    read_torch_file,
)

# What reading one that is not whole raises.
_DAMAGES = (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError)


class DurableCheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints, for any strategy that puts one into a single file.

    Lightning's own writing is complete or not there as well, but it is not on the disk when it returns
    (no fsync), and nothing is left where the file that it has replaced turns out to be damaged later.
    """

    def save_checkpoint(self, checkpoint: Mapping, path: str | Path, storage_options: object = None) -> None:
        write_checkpoint(checkpoint, Path(path))


def previous_of(path: Path) -> Path:
    """Where the checkpoint is kept that the one at ``path`` has replaced."""
    return path.with_name(f"previous_{path.name}")


def write_checkpoint(checkpoint: Mapping, path: Path) -> None:
    """Write under a temporary name, to the disk (fsync), then rename.

    At every moment ``path`` or :func:`previous_of` it is a whole checkpoint. Raises ``RunCutShort`` when
    there is no room; both are then as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    writing = None
    try:
        with open(temporary, "wb") as file:
            writing = _Remembering(file)
            torch.save(checkpoint, writing)
            file.flush()
            os.fsync(file.fileno())
        _keep_as_previous(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch reports a write that failed as a RuntimeError about positions in the file.
    except (OSError, RuntimeError) as error:
        cause = error if writing is None or writing.failed is None else writing.failed
        temporary.unlink(missing_ok=True)
        if getattr(cause, "errno", None) not in NO_ROOM:
            raise
        kept = f"{path} is still the one before" if path.exists() else "there is none from before"
        raise RunCutShort(
            f"no room for a checkpoint ({cause.strerror}): {temporary} could not be written; {kept}"
        ) from error


def restore_checkpoint(path: Path) -> str | None:
    """Make sure that the checkpoint at ``path`` is whole, by the one before if need be; says so then.

    Raises ``UserError`` when neither can be read.
    """
    problem = _problem(path)
    if problem is None:
        return None
    previous = previous_of(path)
    if not previous.is_file():
        raise UserError(f"resume=true: {path}: {problem}; start a new run without it")
    if (also := _problem(previous)) is not None:
        raise UserError(
            f"resume=true: {path}: {problem}, and the one before, {previous}: {also}; start anew without it"
        )
    os.replace(previous, path)
    return f"{path}: {problem}; going on from the one before, {steps_of(path)} steps"


def steps_of(path: Path) -> int | None:
    """How many steps the checkpoint of a run has made; None where there is none that can be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (*_DAMAGES, KeyError, TypeError):
        return None


def check_same_model(path: Path, module: nn.Module) -> None:
    """Raise ``UserError`` where the checkpoint at ``path`` is not of the model that is to go on."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    try:
        check_sizes(module.state_dict(), state)
    except Unreadable as error:
        raise UserError(f"resume=true: {path}: {error}; start a new run without it") from error


def _problem(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, None if nothing is; every byte of it is read."""
    if not path.is_file():
        return "missing"
    try:
        checkpoint = read_torch_file(path, mmap=True)
        if not isinstance(checkpoint, dict) or not {"global_step", "state_dict"} <= set(checkpoint):
            return "not a checkpoint of a run"
        step, state = checkpoint["global_step"], checkpoint["state_dict"]
        if type(step) is not int or step < 0 or not isinstance(state, dict):
            return "not a checkpoint of a run"
        check_tensors(state, path.stat().st_size)
        check_finite(state)
    except Unreadable as error:
        return str(error)
    return None


def _keep_as_previous(path: Path) -> None:
    if not path.exists():
        return
    previous = previous_of(path)
    linked = previous.with_name(f"{previous.name}.tmp")
    linked.unlink(missing_ok=True)
    try:
        os.link(path, linked)  # a second name: the first one stays until the new file takes it
        os.replace(linked, previous)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        os.replace(path, previous)  # no links on this file system: for a moment there is only the previous


def _sync_folder(folder: Path) -> None:
    """The names are on the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


class _Remembering:
    """A file that remembers why a write failed: torch loses it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise

    def flush(self) -> None:
        self._file.flush()
