"""How long things take: several ways to do the same, measured in turns in one run."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import torch

from clipmapper.outputs import write_whole


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
    """What the times depend on. ``load``: how many threads wanted to run, on average of the last minute."""
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
