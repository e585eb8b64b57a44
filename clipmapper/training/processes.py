"""Several processes of one run: which one this is, and what they tell each other.

Outside of such a run every function here is the one of a run with one process.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from clipmapper.errors import UserError

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
    batches = batch_count(count, batch_size, share)
    for batch in range(batches):
        yield mine[len(mine) * batch // batches : len(mine) * (batch + 1) // batches]


def batch_count(count: int, batch_size: int, share: Share) -> int:
    """How many batches :func:`batches_of` gives."""
    return min(-(-count // (share.of * batch_size)), count // share.of)


def form_group(timeout: timedelta) -> None:
    """For what the processes tell each other on the CPU; each has to call it, when they are all there.

    ``timeout``: how long one waits for another.
    """
    global _group
    _group = distributed.new_group(backend="gloo", timeout=timeout)
    # That of all was formed with another. Older releases of torch have the function by another name.
    set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
    set_timeout(timeout, distributed.group.WORLD)


def this_share() -> Share:
    """The part of every batch and split that this process works on."""
    return Share(distributed.get_rank(), distributed.get_world_size()) if _several() else WHOLE


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return this_share().index == 0


def in_main(work: Callable[[], _Value]) -> _Value:
    """Do ``work`` in the main process; all of them get what it returns or raises (``UserError``)."""
    if not _several():
        return work()
    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    distributed.broadcast_object_list(found, src=0, group=_group)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def from_all(value: _Value) -> list[_Value]:
    """The values of all processes, in every process, by rank."""
    if not _several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_group)
    return values


def in_any(flag: bool) -> bool:
    """Whether it is so in any process: they stop together, or wait for each other for ever."""
    if not _several():
        return flag
    told = torch.tensor(int(flag))
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=_group)
    return bool(told)


def sum_of_all(number: int | float) -> int | float:
    """The sum over all processes."""
    if not _several():
        return number
    total = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(total, group=_group)
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


def raise_flag(name: str) -> None:
    """To be seen by all processes, now or later, without waiting for any."""
    if _several():
        distributed.distributed_c10d._get_default_store().add(f"flag: {name}", 1)


def flag_raised(name: str) -> bool:
    """Whether a process has raised it, as far as it is known by now."""
    return _several() and distributed.distributed_c10d._get_default_store().add(f"flag: {name}", 0) > 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


# Flags and names are exchanged on the CPU: a GPU would have to be waited for in every step.
_group: distributed.ProcessGroup | None = None
