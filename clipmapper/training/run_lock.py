"""One process at a time goes on with a run."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipmapper.errors import UserError

_LOCK = "running"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises ``UserError`` where another process is within already.

    The system forgets the lock with its process, however that ends. A file system without locks has none.
    """
    # Not flock: workers that are forked would have the lock as well, and may outlive this process a little.
    path = folder / _LOCK
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder}: a run is running there already ({file.read().strip()})"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
