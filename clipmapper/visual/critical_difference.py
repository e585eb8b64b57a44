"""The diagram of critical differences: mean ranks on a line, and bars over what is not told apart."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipmapper.visual.curves import FOREMOST
from clipmapper.visual.layout import (
    CAPTION_SIZE,
    FAINT,
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

_MARGIN, _LINE, _GAP = 0.3, 4.6, 0.12  # inches: of the page, of the line of ranks, between texts and lines
_ROW, _BAR = 0.19, 0.09  # heights of a method and of a bar
_SIZE, _TITLE_SIZE, _TICK_SIZE = 8.5, 12.0, 8.0
_ACCENT = "#D55E00"
_TICKS = 12  # at most


@house_style()
def plot_critical_difference(
    mean_ranks: Mapping[str, float],
    difference: float,
    cliques: Sequence[tuple[int, int]],
    *,
    title: str,
    note: str = "",
    marked: Collection[str] = (),
) -> Figure:
    """The diagram of Demšar 2006, figure 1: the best method is on the left, where ranks are low.

    ``cliques``: (first, last) of the methods sorted by mean rank that a bar joins, since they differ by less
    than the critical ``difference``. ``marked``: methods with a dagger behind their name. Raises ValueError
    for fewer than two methods.
    """
    if len(mean_ranks) < 2:
        raise ValueError("ranks of fewer than two methods say nothing")
    order = sorted(mean_ranks, key=lambda method: mean_ranks[method])
    names = {method: f"{method} †" if method in marked else method for method in order}
    half = (len(order) + 1) // 2
    shown = {method: f"{names[method]}  {mean_ranks[method]:.2f}" for method in order}
    label = max(text_width(text, _SIZE, "bold") for text in shown.values()) + 2 * _GAP
    width = 2 * (_MARGIN + label) + _LINE
    heading = wrap([Run(title, weight="bold")], width - 2 * _MARGIN, _TITLE_SIZE)
    caption = wrap([Run(note, FAINT)], width - 2 * _MARGIN, CAPTION_SIZE)
    top = _MARGIN + len(heading) * line_height(_TITLE_SIZE) + 0.75
    below = top + 0.14 + len(cliques) * _BAR
    foot = below + 0.1 + half * _ROW + 0.15
    height = foot + len(caption) * line_height(CAPTION_SIZE) + _MARGIN
    figure = new_figure(width, height)
    write_lines(figure, _MARGIN, _MARGIN, heading, _TITLE_SIZE)
    write_lines(figure, _MARGIN, foot, caption, CAPTION_SIZE)

    axes = axes_at(figure, 0.0, 0.0, width, height)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    ranks = [mean_ranks[method] for method in order]
    first, last = int(np.floor(ranks[0])), int(np.ceil(ranks[-1]))
    last = max(last, first + 1)
    left = _MARGIN + label

    def at(rank: float | int) -> float:
        return left + _LINE * (rank - first) / (last - first)

    _line(axes, [at(first), at(last)], [top, top], 1.4)
    step = -(-(last - first) // _TICKS)
    for tick in range(first, last + 1, step):
        _line(axes, [at(tick), at(tick)], [top - 0.07, top], 1.0)
        write(figure, at(tick), top - 0.12, str(tick), _TICK_SIZE, align="center")
    # The critical difference itself, as long as it is on the line.
    long = min(_LINE * difference / (last - first), _LINE)
    high = top - 0.42
    _line(axes, [left, left + long], [high, high], 1.4)
    for end in (left, left + long):
        _line(axes, [end, end], [high - 0.04, high + 0.04], 1.4)
    more = " (longer than the line)" if difference > last - first else ""
    write(figure, left + long + 0.08, high + 0.04, f"CD {difference:.2f}{more}", _TICK_SIZE)
    for number, (begin, end) in enumerate(cliques):
        bar = top + 0.11 + number * _BAR
        _line(axes, [at(ranks[begin]) - 0.02, at(ranks[end]) + 0.02], [bar, bar], 3.0)
    for place, method in enumerate(order):
        on_left = place < half
        row = place if on_left else len(order) - 1 - place
        y = below + 0.1 + row * _ROW
        x = at(mean_ranks[method])
        side = left - _GAP / 2 if on_left else left + _LINE + _GAP / 2
        mine = method == FOREMOST
        _line(axes, [x, x, side], [top, y, y], 1.2 if mine else 0.6, _ACCENT if mine else FAINT)
        write(
            figure,
            side - _GAP / 2 if on_left else side + _GAP / 2,
            y + 0.035,
            shown[method],
            _SIZE,
            colour=_ACCENT if mine else INK,
            weight="bold" if mine else "normal",
            align="right" if on_left else "left",
        )
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], thickness: float, colour: str = INK) -> None:
    axes.plot(x, y, color=colour, linewidth=thickness, solid_capstyle="butt", solid_joinstyle="miter")
