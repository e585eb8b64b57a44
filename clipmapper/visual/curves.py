"""Perturbation curves of all methods, and their areas."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clipmapper.visual.layout import (
    CAPTION_SIZE,
    FAINT,
    FONT,
    INK,
    Run,
    axes_at,
    house_style,
    line_height,
    new_figure,
    text_width,
    wrap,
    write,
    write_lines,
)

Curve = tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"], Float[np.ndarray, "points"]]

_MARGIN, _PANEL_WIDTH, _PANEL_HEIGHT = 0.28, 2.75, 2.1
_LEFT, _BELOW, _ABOVE = 0.52, 0.50, 0.46  # room for the tick labels and titles of a panel
_SAMPLE = 0.34  # length of a line in the legend
_LEGEND_SIZE, _NOTE_SIZE, _TITLE_SIZE = 8.5, 7.5, 12.0
_ORDER = ("positive", "negative")
_TITLES = {"positive": "most relevant {} first", "negative": "least relevant {} first"}
_GOOD = {
    "positive": "a faithful method falls fast (low area)",
    "negative": "a faithful method stays up (high area)",
}
_SIGNS = {"positive": "pos. ↓", "negative": "neg. ↑"}
_AREA_WIDTH = 0.5


@house_style()
def plot_perturbation_curves(
    curves: Mapping[str, Mapping[str, Curve]],
    fractions: Sequence[float | int],
    *,
    ylabel: str,
    areas: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
    what_is_done: str = "removed",
) -> Figure:
    """One panel per key of `curves` ("image/positive", "text/negative", …) and one line per method.

    A curve is (mean, lower bound, upper bound) of a 95 % interval at each of `fractions`, the shares of
    tokens removed, in [0, 1]. `ylabel` says what is scored ("soft accuracy"), `what_is_done` ("removed",
    "replaced") what was done to the tokens. With `areas`, keyed as `curves`, the legend is a table of areas
    with the best of each column in bold: the lowest for "positive", the highest for "negative". Panels of one
    row share their y axis. Raises ValueError where a curve and `fractions` differ in length.
    """
    if not curves:
        raise ValueError("there are no curves to plot")
    for panel, lines in curves.items():
        for method, curve in lines.items():
            if any(len(part) != len(fractions) for part in curve):
                raise ValueError(f"curve {panel}/{method} does not have {len(fractions)} points")
    panels = sorted(curves, key=_panel_order)
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    methods = sorted({method for lines in curves.values() for method in lines}, key=_method_order(curves))
    area_panels = [panel for panel in panels if areas is not None and panel in areas]
    table_left = _MARGIN + columns * (_LEFT + _PANEL_WIDTH) + 0.3
    page_width = table_left + _legend_width(methods, len(area_panels)) + _MARGIN
    heading = wrap([Run(title or "", weight="bold")], page_width - 2 * _MARGIN, _TITLE_SIZE)
    head = len(heading) * line_height(_TITLE_SIZE) + 0.08 if heading else 0.0
    page_height = 1.5 * _MARGIN - 0.1 + head + len(rows) * (_ABOVE + _PANEL_HEIGHT + _BELOW)
    page_height = max(page_height, 2 * _MARGIN + head + _ABOVE + (len(methods) + 2) * _legend_row())
    figure = new_figure(page_width, page_height)
    write_lines(figure, _MARGIN, _MARGIN - 0.04, heading, _TITLE_SIZE)

    for row_number, row in enumerate(rows):
        top = _MARGIN - 0.1 + head + row_number * (_ABOVE + _PANEL_HEIGHT + _BELOW) + _ABOVE
        low, high = _limits([curves[panel] for panel in row])
        for column, panel in enumerate(row):
            left = _MARGIN + column * (_LEFT + _PANEL_WIDTH) + _LEFT
            axes = axes_at(figure, left, top, _PANEL_WIDTH, _PANEL_HEIGHT)
            _draw_panel(axes, curves[panel], fractions, methods)
            axes.set_ylim(low, high)
            modality, _, sign = panel.partition("/")
            order = _TITLES.get(sign, sign).format(what_is_done)
            write(figure, left, top - 0.24, f"{modality}: {order}", 9.5, weight="bold")
            write(figure, left, top - 0.09, _GOOD.get(sign, ""), _NOTE_SIZE, colour=FAINT)
            axes.set_xlabel(f"share of tokens {what_is_done} (%)", fontsize=8.5, fontfamily=FONT, color=INK)
            if column == 0:
                axes.set_ylabel(ylabel, fontsize=8.5, fontfamily=FONT, color=INK)
    _legend(figure, table_left, _MARGIN - 0.1 + head + _ABOVE, methods, area_panels, areas or {})
    return figure


def _panel_order(panel: str) -> tuple[str, int, str]:
    modality, _, sign = panel.partition("/")
    return modality, _ORDER.index(sign) if sign in _ORDER else len(_ORDER), sign


def _method_order(curves: Mapping[str, Mapping[str, Curve]]) -> Callable[[str], tuple[bool, int]]:
    """Sort key: the foremost method first, then as the caller lists them."""
    listed = list(dict.fromkeys(method for lines in curves.values() for method in lines))
    return lambda method: (method != FOREMOST, listed.index(method))


def _limits(panels: Sequence[Mapping[str, Curve]]) -> tuple[float, float]:
    """y limits that hold all bands, with a little room; 0 is included when it is near."""
    low = min(float(np.min(curve[1])) for lines in panels for curve in lines.values())
    high = max(float(np.max(curve[2])) for lines in panels for curve in lines.values())
    room = 0.05 * (high - low) or 0.05
    return (min(low, 0.0) if 0 <= low < 0.15 * high else low) - room, high + room


def _draw_panel(
    axes: Axes, lines: Mapping[str, Curve], fractions: Sequence[float | int], methods: Sequence[str]
) -> None:
    percent = 100 * np.asarray(fractions, dtype=np.float64)
    for depth, method in enumerate(reversed(methods)):  # the first method is drawn last, on top
        if method not in lines:
            continue
        mean, low, high = lines[method]
        colour = line_style(method).colour
        axes.fill_between(percent, low, high, color=colour, alpha=0.13, linewidth=0, zorder=2 + 0.01 * depth)
        axes.plot(percent, mean, zorder=3 + 0.01 * depth, **_line(method))
    axes.set_xlim(percent.min() - 2, percent.max() + 2)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#808080", linewidth=0.7)
    axes.tick_params(labelsize=8, labelfontfamily=FONT, color="#808080", labelcolor=INK, length=3, width=0.7)


def _line(method: str) -> dict[str, object]:
    style, foremost = line_style(method), method == FOREMOST
    return {
        "color": style.colour, "linestyle": style.dashes, "marker": style.marker,
        "linewidth": 2.4 if foremost else 1.3, "markersize": 4.6 if foremost else 3.6,
        "markeredgewidth": 1.0 if style.marker == "x" else 0.4,
        "markeredgecolor": style.colour if style.marker == "x" else "white",
    }  # fmt: skip


def _legend_row() -> float:
    return 1.3 * line_height(_LEGEND_SIZE)


def _name_width(methods: Sequence[str]) -> float:
    return _SAMPLE + 0.08 + max(text_width(method, _LEGEND_SIZE, "bold") for method in methods)


def _legend_width(methods: Sequence[str], area_columns: int) -> float:
    table = _name_width(methods) + (0.1 + area_columns * _AREA_WIDTH if area_columns else 0.0)
    return max(table, text_width(_note(area_columns), _NOTE_SIZE))


def _note(area_columns: int) -> str:
    return "bands: 95 % intervals" + ("; bold: best of the column" if area_columns else "")


def _legend(
    figure: Figure, left: float, top: float, methods: Sequence[str], panels: Sequence[str],
    areas: Mapping[str, Mapping[str, float]],
) -> None:  # fmt: skip
    """Line samples and names; beside them a table of areas, one column per panel."""
    ends = [left + _name_width(methods) + 0.1 + (number + 1) * _AREA_WIDTH for number in range(len(panels))]
    if panels:
        # One panel is too narrow a column for the long heading.
        heading = "area under the curve" if len(panels) > 2 else "area"
        write(figure, ends[-1], top - 0.24, heading, CAPTION_SIZE, colour=FAINT, align="right")
    for end, panel in zip(ends, panels, strict=True):
        modality, _, sign = panel.partition("/")
        write(figure, end, top - 0.08, modality, _NOTE_SIZE, colour=FAINT, align="right")
        write(figure, end, top + 0.04, _SIGNS.get(sign, sign), _NOTE_SIZE, colour=FAINT, align="right")
    width, height = figure.get_size_inches()
    for number, method in enumerate(methods):
        baseline = top + 0.04 + (number + 1) * _legend_row()
        y = 1 - (baseline - 0.045) / height
        xs = [(left + part * _SAMPLE) / width for part in (0, 0.5, 1)]
        figure.add_artist(Line2D(xs, [y, y, y], markevery=[1], **_line(method)))
        weight = "bold" if method == FOREMOST else "normal"
        write(figure, left + _SAMPLE + 0.08, baseline, method, _LEGEND_SIZE, weight=weight)
        for end, panel in zip(ends, panels, strict=True):
            if method in areas[panel]:
                best = areas[panel][method] == _best(areas[panel], panel)
                weight = "bold" if best else "normal"
                write(figure, end, baseline, f"{areas[panel][method]:.3f}", 8.0, weight=weight, align="right")
    below = top + 0.08 + (len(methods) + 1) * _legend_row()
    write(figure, left, below, _note(len(panels)), _NOTE_SIZE, colour=FAINT)


def _best(areas: Mapping[str, float], panel: str) -> float | None:
    """The area of a panel's most faithful method; None where its name does not tell which end is good."""
    sign = panel.partition("/")[2]
    return min(areas.values()) if sign == "positive" else max(areas.values()) if sign == "negative" else None


FOREMOST = "weighted"  # the paper's method: drawn thickest and on top


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and marker in matplotlib's terms."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    marker: str


_DASHED, _DOTTED, _MIXED = (0, (5.0, 2.0)), (0, (1.2, 1.6)), (0, (6.0, 2.0, 1.2, 2.0))

_STYLES = {
    "weighted": LineStyle("#D55E00", "-", "o"),
    "weighted_token": LineStyle("#E69F00", _DASHED, "s"),
    "weighted_half": LineStyle("#8C6D1F", _DOTTED, "D"),
    "gae": LineStyle("#0072B2", "-", "^"),
    "rollout": LineStyle("#009E73", "-", "v"),
    "attention_flow": LineStyle("#117733", _DASHED, "<"),
    "raw_attention": LineStyle("#56B4E9", _MIXED, ">"),
    "grad_cam": LineStyle("#CC79A7", "-", "P"),
    "transformer_attribution": LineStyle("#332288", _DASHED, "X"),
    "partial_lrp": LineStyle("#882255", _MIXED, "s"),
    "attn_lrp": LineStyle("#AA4499", _DASHED, "D"),
    "integrated_gradients": LineStyle("#44AA99", _MIXED, "h"),
    "occlusion": LineStyle("#000000", "-", "*"),
    "input_x_gradient": LineStyle("#999933", _DASHED, "p"),
    "random": LineStyle("#7A7A7A", _DOTTED, "x"),
}
_SPARE_COLOURS = ("#CC6677", "#6699CC", "#997700", "#994455", "#004488")
_SPARE_DASHES = (_DASHED, _MIXED, _DOTTED)
_SPARE_MARKERS = ("h", "p", "d", "<", "*")


def line_style(method: str) -> LineStyle:
    """The style of a method; a name without a fixed style gets one computed from its letters."""
    if method in _STYLES:
        return _STYLES[method]
    # Not hash(): that differs from one Python process to the next.
    number = zlib.crc32(method.encode())
    colour = _SPARE_COLOURS[number % len(_SPARE_COLOURS)]
    dashes = _SPARE_DASHES[number // 5 % len(_SPARE_DASHES)]
    return LineStyle(colour, dashes, _SPARE_MARKERS[number // 15 % len(_SPARE_MARKERS)])
