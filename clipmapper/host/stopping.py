"""Signals that end a command, who hears them, and a terminal that is no longer there."""

import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipmapper.host.outputs import NO_ROOM

# Ctrl-C; kill, SLURM and Docker; a terminal that is closed; what schedulers send some time before the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
_libc = ctypes.CDLL(None)
_ONCE = 1.0  # seconds in which several signals are one: launchers hand on what their group has had already
_shields = 0
_local = threading.local()


class Stopped(KeyboardInterrupt):
    """One of ``SIGNALS`` has come: ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def a_command() -> Iterator[None]:
    """Guard all that a command's main does: each of ``SIGNALS`` raises :class:`Stopped` in the main thread,
    forked processes ignore them, and output that can't be printed is no reason to stop. A full disk is one
    line and exit status 2.

    Handlers that others have installed (submitit's, of SIGUSR2) stay, and so does ``nohup``.
    """
    with _printing_what_can_be_printed(), forks_ignore_signals():
        previous = _install(_Raising())
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            where = f": {error.filename}" if error.filename else ""
            print(f"error: no room to write ({error.strerror}){where}", file=sys.stderr)
            sys.exit(2)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def reinstall() -> None:
    """Put the handlers of :func:`a_command` back where a library has put its own around them."""
    if (raising := _Raising.current) is not None:
        for number in raising.numbers:
            signal.signal(number, raising)


def of_another(handler: object) -> bool:
    """Whether a handler is neither the system's, nor Python's, nor one of ours."""
    return callable(handler) and not isinstance(handler, _Raising) and handler != signal.default_int_handler


@contextmanager
def forks_ignore_signals() -> Iterator[None]:
    """Processes that are forked within (the workers of DataLoaders) leave ``SIGNALS`` to the main process.

    A signal to the whole process group would otherwise end them, and with them the step that is running.
    They end when the main process does, however it ends, and at its own SIGTERM.
    """
    global _shields
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1


class _Raising:
    """The handler. Signals behind the first one are its repetitions; a later Ctrl-C is not."""

    current: "_Raising | None" = None

    def __init__(self) -> None:
        self.numbers: list[signal.Signals] = []
        self.first: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.first is not None and (number != signal.SIGINT or now - self.first < _ONCE):
            return
        self.first = self.first or now
        raise Stopped(number)


def _install(raising: _Raising) -> dict[signal.Signals, Any]:
    previous = {}
    for number in SIGNALS:
        before = signal.getsignal(number)
        # A shell starts background jobs with Ctrl-C ignored; who sends them one means it.
        ours = (signal.SIG_DFL, signal.default_int_handler)
        if before not in ours and not (number == signal.SIGINT and before == signal.SIG_IGN):
            continue
        try:
            previous[number] = signal.signal(number, raising)
        except ValueError:  # not the main thread: whoever runs it there handles signals
            return {}
    raising.numbers = list(previous)
    _Raising.current = raising if previous else None
    return previous


def _before_fork() -> None:
    # Blocked from before the fork on: there is no moment in which the new process could be hit.
    _local.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if _shields else None
    _local.parent = os.getpid()


def _after_fork_in_parent() -> None:
    if _local.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _local.mask)


def _after_fork_in_child() -> None:
    if _local.mask is not None:
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            # At once, before it runs into what the parent has left behind. (The system means the thread that
            # forked, which must not be one that ends earlier.)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=_end_with, args=(_local.parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Wait for the end of the parent, or for its SIGTERM, by which it ends a worker that it needs no more."""
    while True:
        if hasattr(signal, "sigtimedwait"):
            told = signal.sigtimedwait([signal.SIGTERM], 1.0)
        else:
            told = time.sleep(1.0)
        if os.getppid() != parent or (told is not None and told.si_pid == parent):
            os._exit(0)


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)


class _Forgiving:
    """A stream whose reader may go away (``| head``, a closed terminal, a full disk): the rest is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # so that what is buffered can be flushed, at the end as well
        os.close(nowhere)
        if error.errno not in (errno.EPIPE, errno.EIO) and self._stream is not sys.__stderr__:
            line = f"warning: what is printed is lost from here on ({error.strerror})"
            print(line, file=sys.stderr)


@contextmanager
def _printing_what_can_be_printed() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Forgiving(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        # In a further process of a run stdout leads nowhere (training/processes.py); it stays so.
        if isinstance(sys.stdout, _Forgiving):
            sys.stdout = streams[0]
        sys.stderr = streams[1]
