"""Whether a checkpoint says of optimiser and loops what the run that goes on from it would have."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from clipmapper.errors import UserError

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
