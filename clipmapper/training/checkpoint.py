"""Checkpoint files: complete or not there, the one before is kept, and a run goes on from its own alone."""

import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

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


def read_encoder(path: Path, model: nn.Module) -> None:
    """Give the model the encoder of the checkpoint at ``path``.

    Lightning gives it all weights, but when training begins: behind what is made of the encoder before, its
    tokens. Of a run that began with ``init`` nothing else has them. Sizes that do not fit are left for
    :func:`check_same_model` to say.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    prefix, wanted = "model.encoder.", model.encoder.state_dict()
    found = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}:
        model.encoder.load_state_dict(found)


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


_LARGEST = 2**53  # of counts
_STEPS = (
    "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed"
)  # fmt: skip


class _Differs(Exception):
    """(where, what is wrong there)"""


def check_resumable(
    path: Path, trainer: lightning.Trainer, module: lightning.LightningModule, *, whole: bool = True
) -> None:
    """Raise ``UserError`` where the checkpoint at ``path`` can't be gone on from: a part is missing, of
    another type or of another optimiser. Lightning would stumble over it, or go on with a wrong one.

    ``whole``: each process has the whole optimiser, as everywhere but with FSDP2, whose states are not
    looked at.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    fresh = module.configure_optimizers()
    optimiser, schedule = fresh["optimizer"], fresh["lr_scheduler"]["scheduler"]
    try:
        for part in ("loops", "optimizer_states", "lr_schedulers"):
            if part not in checkpoint:
                raise _Differs(part, "missing")
        _check_version(checkpoint.get("pytorch-lightning_version"))
        loops = checkpoint["loops"]
        _check_alike({"fit_loop": trainer.fit_loop.state_dict()}, loops, "loops")
        for key in _STEPS:
            loops = loops[key]
        if loops != checkpoint["global_step"]:
            raise _Differs("loops", f"{loops} steps, elsewhere {checkpoint['global_step']}")
        _check_alike([schedule.state_dict()], checkpoint["lr_schedulers"], "lr_schedulers")
        _check_schedule(schedule, checkpoint["lr_schedulers"][0], checkpoint["global_step"])
        if whole:
            states = checkpoint["optimizer_states"]
            if not isinstance(states, list) or len(states) != 1:
                raise _Differs("optimizer_states", "not of one optimiser")
            _check_optimiser(optimiser, states[0])
    except _Differs as error:
        where, what = error.args
        raise UserError(
            f"resume=true: {path}: it does not fit this run ({where}: {what}); start a new run without it"
        ) from error


def _check_version(found: object) -> None:
    """Lightning migrates the checkpoints of older versions, of which there are none."""
    try:
        known = Version(found).major >= 2
    except (TypeError, InvalidVersion):
        known = False
    if not known:
        raise _Differs("pytorch-lightning_version", f"{_shown(found)} is not Lightning 2 or later")


def _check_alike(wanted: Any, found: Any, where: str) -> None:
    """The same keys, lengths and types, and counts that can be; more keys may be there."""
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            raise _Differs(where, "not an object")
        for key, value in wanted.items():
            if key not in found:
                raise _Differs(f"{where}.{key}", "missing")
            _check_alike(value, found[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            raise _Differs(where, f"not a list of {len(wanted)}")
        for number, (value, other) in enumerate(zip(wanted, found, strict=True)):
            _check_alike(value, other, f"{where}.{number}")
    elif type(wanted) is float:
        if type(found) not in (int, float) or not math.isfinite(found):
            raise _Differs(where, f"{_shown(found)} is not a number")
    elif type(found) is not type(wanted):
        raise _Differs(where, f"{_shown(found)} in place of {_shown(wanted)}")
    elif type(found) is int and not 0 <= found < _LARGEST:
        raise _Differs(where, f"{_shown(found)} is no count")


def _check_schedule(schedule: LRScheduler, found: Mapping, steps: int) -> None:
    if list(found["base_lrs"]) != list(schedule.base_lrs):
        raise _Differs("lr_schedulers.base_lrs", f"{found['base_lrs']} in place of {schedule.base_lrs}")
    if abs(found["last_epoch"] - steps) > 1:  # one behind, where a run was stopped between the two
        raise _Differs("lr_schedulers.last_epoch", f"{found['last_epoch']} after {steps} steps")


def _check_optimiser(optimiser: torch.optim.Optimizer, found: object) -> None:
    wanted = optimiser.state_dict()["param_groups"]
    if not isinstance(found, Mapping) or not {"state", "param_groups"} <= set(found):
        raise _Differs("optimizer_states", "no state and param_groups")
    _check_alike(wanted, found["param_groups"], "param_groups")
    for group, other in zip(wanted, found["param_groups"], strict=True):
        for key, value in group.items():
            # The rate is the schedule's, which sets it at every step.
            if key != "lr" and other[key] != value:
                raise _Differs(f"param_groups.{key}", f"{_shown(other[key])} in place of {_shown(value)}")
    weights = dict(enumerate(weight for group in optimiser.param_groups for weight in group["params"]))
    if not isinstance(found["state"], Mapping):
        raise _Differs("state", "not an object")
    for number, entry in found["state"].items():
        if number not in weights:
            raise _Differs("state", f"of a weight {_shown(number)}, which is not there")
        for name, problem in _state_problems(entry, weights[number]):
            raise _Differs(f"state.{number}{name}", problem)


def _state_problems(entry: object, weight: nn.Parameter) -> Iterator[tuple[str, str]]:
    if not isinstance(entry, Mapping):
        yield "", "not an object"
        return
    if missing := [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in entry]:
        yield f".{missing[0]}", "missing"
    for name, value in entry.items():
        wanted = () if name == "step" else tuple(weight.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted or not value.is_floating_point():
            yield f".{name}", f"not a tensor of the shape {list(wanted)}"
        elif not bool(value.isfinite().all()) or (name != "exp_avg" and bool((value < 0).any())):
            yield f".{name}", "numbers that can't be"


def _shown(value: object) -> str:
    return ascii(value)[:60]
