"""How much memory is left."""

import os
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


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
