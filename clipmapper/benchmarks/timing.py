"""How long things take: several ways to do the same, measured in turns in one run."""

import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch

from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole


def measured(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    patience_s: float | None = None,
    progress: Callable[[str], object] | None = None,
) -> dict[str, dict]:
    """Median, fastest and all times in seconds of each way, after one run of each that does not count.

    The ways take turns, so that a machine that is busy for a while slows all of them. ``cpu_median_s`` is
    the time that this process's threads spent, which counts less of what others do meanwhile.
    ``patience_s``: a way that has taken this long in all is run no more (but once at least).
    ``progress`` is told which way is run next.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)
    for turn in range(repeats + 1):
        for name, work in ways.items():
            if times[name] and patience_s is not None and spent[name] > patience_s:
                continue
            if progress is not None:
                progress(name)
            began = time.process_time()
            seconds = _seconds(work)
            spent[name] += seconds
            if turn > 0:
                times[name].append(seconds)
                cpu[name].append(time.process_time() - began)
    return {
        name: {
            "median_s": statistics.median(of),
            "fastest_s": min(of),
            "all_s": of,
            "cpu_median_s": statistics.median(cpu[name]),
        }
        for name, of in times.items()
    }


def machine(device: torch.device) -> dict:
    """Return what the times depend on. ``load``: threads that wanted to run, mean of the last minute."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "name": name or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "when": datetime.now().isoformat(timespec="seconds"),
    }


def write_results(name: str, results: Mapping, output: Path) -> Path:
    """``output/name.json``; it appears complete or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    return write_whole(output / f"{name}.json", json.dumps(results, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator had given out at one time during ``work``, less what it had before.

    Exact and the same every time; what libraries take for themselves (workspaces of matrix products) is not
    in it. The resident memory of a whole process is :func:`peak_resident_bytes`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def peak_resident_bytes() -> int:
    """The most memory that this process has had so far.

    Linux's getrusage would not do: a process begins there with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int:
    """Return how much memory of the device (of the host, for a CPU) is still free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _quiet:
    """The profiler's native part writes lines of its own to stderr; not in here."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *error: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)


def earlier_rows(path: Path, now: Mapping, must_agree: Mapping[str, Sequence[str]]) -> list[dict]:
    """The rows of ``path``; none where there is no such file.

    ``must_agree``: section → its entries that must be what they are ``now``. Raises ``UserError`` where one
    is not, and for a file that is no result of a benchmark.
    """
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        rows = before["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("no rows")
        entries = [(s, key, before[s].get(key)) for s, keys in must_agree.items() for key in keys]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--resume: {path} is no result of this benchmark; remove it, or give another --name"
        ) from error
    for section, key, was in entries:
        if was != now[section][key]:
            raise UserError(
                f"--resume: {path} was measured with {key} {was}, now it is {now[section][key]}; make them "
                "the same, or give another --name"
            )
    return rows
