"""The machine that a measurement belongs to."""

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch


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


def commit(folder: Path) -> str | None:
    """The commit of the repository that the folder is in, with a plus behind it where a file that belongs to
    it has changed; None without a repository."""

    def git(*command: str) -> str:
        told = ["git", "-C", str(folder), *command]
        return subprocess.run(told, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
