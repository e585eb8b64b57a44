"""Several processes of one run: starting them, which one this is, and what they tell each other.

Outside of such a run every function here is the one of a run with one process.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import ClusterEnvironment
from torch import distributed

from clipmapper.config import TrainerConfig
from clipmapper.errors import UserError
from clipmapper.training.less_noise import less_noise

_Value = TypeVar("_Value")


class Share(NamedTuple):
    """Part ``index`` of ``of`` equal parts of a batch or a split."""

    index: int = 0
    of: int = 1

    def rows(self, whole: Sequence) -> Sequence:
        """This part of a sequence (a list, an array, a tensor): parts differ by one in length at most."""
        return whole[self.index :: self.of]

    def part(self, index: int, of: int) -> "Share":
        """A part of this part; together the parts are the same rows."""
        return Share(self.index + self.of * index, self.of * of)


WHOLE = Share()


def batches_of(count: int, batch_size: int, share: Share) -> Iterator[range]:
    """A share of ``count`` numbered samples, in order, in batches of about ``batch_size``.

    Every share has equally many batches and none is empty, because processes may have to wait for each other
    in each. Raises ``UserError`` when there are fewer samples than shares.
    """
    if count < share.of:
        raise UserError(f"a split of {count} samples cannot be shared among {share.of} processes")
    mine = range(share.index, count, share.of)
    batches = min(-(-count // (share.of * batch_size)), count // share.of)
    for batch in range(batches):
        yield mine[len(mine) * batch // batches : len(mine) * (batch + 1) // batches]


def start_processes(trainer: TrainerConfig) -> torch.device:
    """Make this process one of as many as there are devices; returns the one that is its own.

    They are started here (by Lightning, with this process's own command line), unless ``torchrun`` or SLURM
    has started them. Raises ``UserError`` in a Hydra sweep, whose command line stands for many runs.
    """
    try:
        fabric = lightning.Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            plugins=cluster(),
        )
    except (
        RuntimeError,
        ValueError,
        MisconfigurationException,
    ) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error
    if fabric.world_size == 1:
        return fabric.device
    launcher = fabric.strategy.launcher
    if launcher is not None and _in_sweep():
        raise UserError(
            f"--multirun with {fabric.world_size} processes a run: each would be started with the sweep's "
            "command line; use trainer.devices=1, or a launcher that starts them itself "
            "(hydra/launcher=submitit_slurm)"
        )
    with less_noise():
        fabric.launch()
    _cpu_group()
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as this process lives
    return fabric.device


def cluster() -> list[ClusterEnvironment]:
    """Plugins for Lightning. On SLURM a run itself saves and goes back into the queue (interruption.py)."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def this_share() -> Share:
    """What of every batch and split this process works on."""
    return Share(distributed.get_rank(), distributed.get_world_size()) if _several() else WHOLE


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return this_share().index == 0


def in_main(work: Callable[[], _Value]) -> _Value:
    """What ``work`` returns or raises (``UserError``): the main process does it, all of them get it."""
    if not _several():
        return work()
    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    distributed.broadcast_object_list(found, src=0, group=_cpu_group())
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def from_all(value: _Value) -> list[_Value]:
    """The values of all processes, in every process, by rank."""
    if not _several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_cpu_group())
    return values


def in_any(flag: bool) -> bool:
    """Whether it is so in any process: they stop together, or wait for each other for ever."""
    if not _several():
        return flag
    told = torch.tensor(int(flag))
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=_cpu_group())
    return bool(told)


def sum_of_all(number: int | float) -> int | float:
    """The sum over all processes."""
    if not _several():
        return number
    total = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(total, group=_cpu_group())
    return float(total)


def check_shares(batch_size: int, accumulated: int) -> None:
    """Raises ``UserError`` where a batch cannot be divided into equal parts."""
    processes = this_share().of
    if batch_size % (processes * accumulated):
        raise UserError(
            f"training.batch_size: {batch_size} samples cannot be divided into {processes} processes × "
            f"{accumulated} (trainer.accumulate_grad_batches) parts; it is the batch of all of them together"
        )


def say_once(line: str) -> bool:
    """Whether the user is to read of this mistake from this process: another may have met it as well."""
    if not _several():
        return True
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.add("failed", 1)
        return store.add(f"said: {line}", 1) == 1
    except RuntimeError:  # the main process, which keeps the store, is gone: it has said something
        return False


def another_has_failed() -> bool:
    """Whether another process has ended with a mistake that the user has read of."""
    if not _several():
        return False
    try:
        return distributed.distributed_c10d._get_default_store().add("failed", 0) > 0
    except RuntimeError:
        return True


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@functools.cache
def _cpu_group() -> distributed.ProcessGroup:
    """Flags and names are exchanged on the CPU: a GPU would have to be waited for in every step."""
    return distributed.new_group(backend="gloo")


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
