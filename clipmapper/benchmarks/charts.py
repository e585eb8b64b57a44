"""Ratios as dots on a line each: what is cheap lies to the left."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from clipmapper.visual.files import save_figure

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
