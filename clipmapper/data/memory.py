"""How much memory, and how much of a disk, is left."""

import os
import shutil
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup/memory.max")  # "max" or a number of bytes (cgroups version 2)


def available_memory() -> int:
    """Bytes that programs on this machine can still take without swapping.

    In a container no more than it may have; where the system doesn't say what is left: all that there is.
    """
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _text(_MACHINE).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            left = int(value.split()[0]) * 1024
    limit = _text(_CONTAINER).strip()
    return min(left, int(limit)) if limit.isdigit() else left


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder is or, where it is not there yet, will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(count: int) -> str:
    """A number of bytes in the unit that people would say it in."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
