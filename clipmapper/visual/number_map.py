"""A table of numbers as a picture: the darker, the lower (ranks), or the higher (agreement)."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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

_MARGIN, _GAP, _WIDE, _HIGH = 0.3, 0.1, 0.52, 0.2  # inches: of the page, beside names, of a cell
_SIZE, _NUMBER_SIZE, _TITLE_SIZE = 8.5, 7.5, 12.0


@house_style()
def plot_numbers(
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float],
    dark_is_low: bool,
    digits: int,
    title: str,
    note: str = "",
) -> Figure:
    """A cell for each number, empty where it is NaN; names of columns are written upwards.

    Raises ValueError where names and values differ in number, or there are none.
    """
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise ValueError(f"{values.shape} values, {len(rows)} rows and {len(columns)} columns")
    label = max(text_width(name, _SIZE) for name in rows) + _GAP
    above = max(text_width(name, _SIZE) for name in columns) + _GAP
    width = max(2 * _MARGIN + label + len(columns) * _WIDE, 4.5)
    heading = wrap([Run(title, weight="bold")], width - 2 * _MARGIN, _TITLE_SIZE)
    caption = wrap([Run(note, FAINT)], width - 2 * _MARGIN, CAPTION_SIZE)
    top = _MARGIN + len(heading) * line_height(_TITLE_SIZE) + 0.1 + above
    foot = top + len(rows) * _HIGH + 0.12
    height = foot + len(caption) * line_height(CAPTION_SIZE) + _MARGIN
    figure = new_figure(width, height)
    write_lines(figure, _MARGIN, _MARGIN, heading, _TITLE_SIZE)
    write_lines(figure, _MARGIN, foot, caption, CAPTION_SIZE)
    axes = axes_at(figure, 0.0, 0.0, width, height)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    colours = matplotlib.colormaps["Blues"]
    left = _MARGIN + label
    for row, name in enumerate(rows):
        write(figure, left - _GAP, top + (row + 0.7) * _HIGH, name, _SIZE, align="right")
        for column in range(len(columns)):
            value = float(values[row, column])
            if np.isnan(value):
                continue
            share = float(np.clip((value - limits[0]) / max(limits[1] - limits[0], 1e-9), 0, 1))
            depth = 0.85 * (1 - share if dark_is_low else share)
            place = (left + column * _WIDE, top + row * _HIGH)
            axes.add_patch(Rectangle(place, _WIDE, _HIGH, facecolor=colours(depth), edgecolor="white"))
            write(
                figure,
                place[0] + _WIDE / 2,
                place[1] + 0.7 * _HIGH,
                f"{value:.{digits}f}",
                _NUMBER_SIZE,
                colour="white" if depth > 0.55 else INK,
                align="center",
            )
    for column, name in enumerate(columns):
        axes.text(
            left + (column + 0.5) * _WIDE,
            top - _GAP / 2,
            name,
            rotation=90,
            fontsize=_SIZE,
            color=INK,
            ha="center",
            va="bottom",
            parse_math=False,
        )
    return figure
