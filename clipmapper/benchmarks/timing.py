"""How long things take: several ways to do the same, measured in turns in one run."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import torch


def measured(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict]:
    """Median, fastest and all times in seconds of each way, after one run of each that does not count.

    The ways take turns, so that a machine that is busy for a while slows all of them.
    """
    for work in ways.values():
        _seconds(work)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(_seconds(work))
    return {
        name: {"median_s": statistics.median(of), "fastest_s": min(of), "all_s": of}
        for name, of in times.items()
    }


def machine(device: torch.device) -> dict:
    """What the times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "when": datetime.now().isoformat(timespec="seconds"),
    }


def write_results(name: str, results: Mapping, output: Path) -> Path:
    """``output/name.json``."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
