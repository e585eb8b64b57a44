"""The other processes of a run: whether they are still there, and who is missing."""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from clipmapper.training.processes import from_all, this_share

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
