"""How long things take: several ways to do the same, measured in turns in one run, and a chart of ratios."""

import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole
from clipmapper.visual.layout import save_figure


def measured(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    patience_s: float | None = None,
    progress: Callable[[str], object] | None = None,
    beside: str | None = None,
) -> dict[str, dict]:
    """Median, fastest and all times in seconds of each way, after one run of each that does not count.

    The ways take turns, so that a machine that is busy for a while slows all of them. ``cpu_median_s`` is
    the time that this process's threads spent, which counts less of what others do meanwhile.
    ``patience_s``: a way that has taken this long in all is run no more (but once at least).
    ``progress`` is told which way is run next. ``beside``: the way that all are divided by; it is run again
    right before each run of another, since a turn of many ways takes longer than a machine keeps its speed,
    and ``time_ratio`` and ``cpu_time_ratio`` are medians of a run divided by that (``beside_s``: its times).
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    others: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)
    for turn in range(repeats + 1):
        for name, work in ways.items():
            if times[name] and patience_s is not None and spent[name] > patience_s:
                continue
            if progress is not None:
                progress(name)
            if beside in ways and name != beside and turn > 0:
                others[name].append(_timed(ways[beside]))
            taken = _timed(work)
            spent[name] += taken[0]
            if turn > 0:
                times[name].append(taken)
    # The way itself stands beside itself.
    return {name: _summary(times[name], times[name] if name == beside else others[name]) for name in ways}


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of this process's threads."""
    began = time.process_time()
    seconds = _seconds(work)
    return seconds, time.process_time() - began


def _summary(times: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> dict:
    seconds, cpu = zip(*times, strict=True)
    found = {
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "all_s": list(seconds),
        "cpu_median_s": statistics.median(cpu),
    }
    if others:
        found["beside_s"] = [other for other, _ in others]
        for place, key in enumerate(("time_ratio", "cpu_time_ratio")):
            found[key] = statistics.median(
                its[place] / other[place] for its, other in zip(times, others, strict=True)
            )
    return found


def write_results(name: str, results: Mapping, output: Path) -> Path:
    """``output/name.json``; it appears complete or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    return write_whole(output / f"{name}.json", json.dumps(results, indent=2) + "\n")


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


_ROW, _TITLE = 0.21, 0.9  # inches
_INK, _FAINT, _DOT, _SLOW = "#222222", "#BBBBBB", "#D55E00", "#7A7A7A"


def ratio_chart(
    groups: Mapping[str, Mapping[str, tuple[float | None, ...]]],
    headers: tuple[str, ...],
    title: str,
    note: str,
    path: Path,
) -> Path:
    """``groups``: name → what was measured → a ratio for each of the ``headers`` (None: not known).
    Writes a picture."""
    lines = sum(1 + len(rows) for rows in groups.values())
    height = _TITLE + 0.5 + _ROW * lines
    figure = Figure(figsize=(9.0, height), dpi=150)
    top, bottom = 1 - _TITLE / height, 0.42 / height
    width = 0.66 / len(headers)
    for i, header in enumerate(headers):
        axes = figure.add_axes((0.3 + i * (width + 0.03), bottom, width - 0.02, top - bottom))
        y = 0
        for group, rows in groups.items():
            if i == 0:
                axes.annotate(
                    group, (0, y), xycoords=("axes fraction", "data"), xytext=(-180, 0),
                    textcoords="offset points", va="center", fontsize=8.5, fontweight="bold", color=_INK,
                    annotation_clip=False,
                )  # fmt: skip
            for name, ratios in rows.items():
                y += 1
                axes.axhline(y, color="#EEEEEE", linewidth=0.8, zorder=0)
                if ratios[i] is not None:
                    colour = _DOT if ratios[i] <= 1.25 else _SLOW
                    axes.plot(ratios[i], y, "o", color=colour, markersize=5)
                    axes.annotate(
                        f"{ratios[i]:.2f}", (ratios[i], y), xytext=(6, 0), textcoords="offset points",
                        va="center", fontsize=7.5, color=_INK,
                    )  # fmt: skip
                if i == 0:
                    axes.annotate(
                        name, (0, y), xycoords=("axes fraction", "data"), xytext=(-8, 0),
                        textcoords="offset points", ha="right", va="center", fontsize=8, color=_INK,
                        annotation_clip=False,
                    )  # fmt: skip
            y += 1
        values = [r[i] for rows in groups.values() for r in rows.values() if r[i] is not None]
        axes.set_xscale("log")
        axes.set_xlim(min([0.5, *(0.8 * v for v in values)]), max([2.0, *(1.8 * v for v in values)]))
        axes.axvline(1, color=_INK, linewidth=0.9, zorder=1)
        axes.set_ylim(y - 0.4, -0.6)
        ticks = [
            t
            for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
            if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
        ]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_yticks([])
        axes.set_title(header, fontsize=9, color=_INK, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=12, fontweight="bold", color=_INK, va="center")
    figure.text(0.02, 1 - 0.52 / height, note, fontsize=8, color=_INK, va="center")
    return save_figure(figure, path)
