"""Several processes of one run: which one this is, what they tell each other, and who is missing.

Outside of such a run every function here is the one of a run with one process.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
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


_STOPPED = ("T", "t")  # as Linux tells of a process that SIGSTOP holds, or a debugger
_INTERVAL = 0.5  # seconds between two looks
_PATIENCE = 10.0  # seconds in which a process that waits for a dead one in vain comes to know by itself


@dataclass(frozen=True)
class _Process:
    rank: int
    pid: int
    started: Popen | None  # by this process


class Companions:
    """Watches over the processes of a run that are on this machine.

    A process that has ended is found within a second. Where this one waits for it all the same (a GPU waits
    for ever), it is ended after a while. Without others it does nothing.
    """

    def __init__(self, others: Sequence[_Process] = (), of: int = 1) -> None:
        self._others, self._of = others, of
        self._end = threading.Event()

    @classmethod
    def of_this_machine(cls, started: Sequence[Popen]) -> "Companions":
        """Gather the processes that form a group already; ``started``: those that this one has started."""
        share = this_share()
        machine = (socket.gethostname(), _namespace())
        told = from_all((machine, os.getpid()))
        own = {process.pid: process for process in started}
        others = [
            _Process(rank, pid, own.get(pid))
            for rank, (where, pid) in enumerate(told)
            if rank != share.index and where == machine
        ]
        return cls(others, share.of)

    def watch(self, give_up: Callable[[], None]) -> None:
        """From now on; ``give_up`` is to end this process where it can't by itself."""
        if self._others:
            self._end.clear()
            threading.Thread(target=self._watch, args=(give_up,), daemon=True).start()

    def end(self) -> None:
        """Watch no more: the others may end now."""
        self._end.set()

    def _watch(self, give_up: Callable[[], None]) -> None:
        while not self._end.wait(_INTERVAL):
            if self.missing() is not None:
                if not self._end.wait(_PATIENCE):
                    give_up()
                return

    def missing(self, patience: float = 0.0) -> str | None:
        """Which process has ended, and how, in words. ``patience``: seconds to wait for that."""
        last = time.monotonic() + patience
        while True:
            for process in self._others:
                if (how := _ended(process)) is not None:
                    return f"process {process.rank} of {self._of} has ended{how}"
            if time.monotonic() >= last:
                return None
            time.sleep(0.1)

    def stopped(self) -> str | None:
        """Which process does not run, though it has not ended, in words."""
        held = [process for process in self._others if _state(process.pid) in _STOPPED]
        named = [f"process {p.rank} of {self._of} (process id {p.pid}) is stopped" for p in held]
        return ", ".join(named) or None

    def is_first_left(self) -> bool:
        """Whether of those that still run (on this machine) this one is to speak."""
        mine = this_share().index
        before = [process for process in self._others if process.rank < mine]
        return all(_ended(p) is not None or _state(p.pid) in _STOPPED for p in before)

    def without_main(self) -> bool:
        """Whether the first process, which keeps what the others tell each other, is gone or stopped."""
        main = [process for process in self._others if process.rank == 0]
        return any(_ended(p) is not None or _state(p.pid) in _STOPPED for p in main)

    def kill_own(self) -> None:
        """End the processes that this one has started, stopped ones too."""
        for process in self._others:
            if process.started is not None:
                process.started.kill()


def _ended(process: _Process) -> str | None:
    """How a process has ended; None of one that has not, or with success."""
    if process.started is not None:
        code = process.started.poll()
        if not code:
            return None
        return f" (signal {-code})" if code < 0 else f" (exit status {code})"
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return None
    return "" if _state(process.pid) in ("Z", "X") else None


def _state(pid: int) -> str | None:
    """The letter by which Linux tells; None elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def _namespace() -> str:
    """Process ids mean something in one of them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
