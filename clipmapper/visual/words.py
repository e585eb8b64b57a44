"""Relevance of words: the words on coloured grounds, in a figure or in HTML."""

import html
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.patches import FancyBboxPatch

from clipmapper.visual.layout import FAINT, FONT, INK, POINTS_PER_INCH, break_word, flow, text_width

WORD_LABEL = "relevance ÷ maximum"
# On white paper more relevance is a deeper colour; the hues are those of the heat map's hot half.
_COLOURS = LinearSegmentedColormap.from_list("words", ["#f6f3ee", "#fddc9a", "#fba246", "#e2542f", "#a81d3c"])
_VALUE_SIZE = 0.58  # size of the value below a word, as a share of the word's


def word_scale() -> ScalarMappable:
    """The colours of the words, for a colour bar from 0 to 1."""
    return ScalarMappable(cmap=_COLOURS)


def share_of_maximum(words: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Scores divided by the greatest; negative scores count as 0, and all are 0 where none is positive."""
    peak = max((score for _, score in words), default=0.0)
    if not np.isfinite([score for _, score in words]).all():
        raise ValueError("word scores must be finite")
    return [(word, max(0.0, score) / peak if peak > 0 else 0.0) for word, score in words]


def word_colours(share: float) -> tuple[str, str]:
    """(ground, ink) as hex colours for a share of the maximum; the ink is the better readable of two."""
    ground = _COLOURS(share)
    luminance = _luminance(to_hex(ground))
    dark, light = _luminance(INK), 1.0
    contrast_dark = (luminance + 0.05) / (dark + 0.05)
    contrast_light = (light + 0.05) / (luminance + 0.05)
    return to_hex(ground), INK if contrast_dark >= contrast_light else "#ffffff"


def _luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.1 (linear light, weights of the sRGB primaries)."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def words_html(words: Sequence[tuple[str, float]]) -> str:
    """The words as HTML spans coloured by score over the greatest score; the score shows on hovering."""
    spans = []
    for (word, score), (_, share) in zip(words, share_of_maximum(words), strict=True):
        ground, ink = word_colours(share)
        spans.append(
            f'<span title="{score:.4g}" style="background-color:{ground};color:{ink};border-radius:4px;'
            f'padding:1px 4px;white-space:pre-wrap">{html.escape(word)}</span>'
        )
    return f'<div style="font-family:sans-serif;line-height:1.9">{" ".join(spans)}</div>'


def _boxes(
    words: Sequence[tuple[str, float]], width: float, size: float
) -> list[tuple[str, float, int, float, float]]:
    """(text, share, line, left edge, width) of every word's box, in inches."""
    padding = _padding(size)
    pieces = [
        (piece, share)
        for word, share in share_of_maximum(words)
        for piece in break_word(" ".join(word.split()), width - 2 * padding, size)
    ]
    widths = [text_width(piece, size) + 2 * padding for piece, _ in pieces]
    places = flow(widths, width, gap=0.22 * size / POINTS_PER_INCH)
    return [
        (piece, share, line, left, box)
        for (piece, share), (line, left), box in zip(pieces, places, widths, strict=True)
    ]


def _padding(size: float) -> float:
    return 0.32 * size / POINTS_PER_INCH


def _row_height(size: float, values: bool) -> float:
    return ((2.55 if values else 1.72) * size) / POINTS_PER_INCH


def words_height(
    words: Sequence[tuple[str, float]], width: float, size: float, values: bool = False
) -> float:
    """Height in inches that `draw_words` needs in axes of the given width in inches."""
    rows = max((line for _, _, line, _, _ in _boxes(words, width, size)), default=-1) + 1
    return rows * _row_height(size, values)


def draw_words(axes: Axes, words: Sequence[tuple[str, float]], size: float, values: bool = False) -> None:
    """Fill the axes with the words, wrapped, on grounds coloured by score over the greatest score.

    `size` is in points; with `values` the share of the greatest score stands below each word. Axes of the
    height that `words_height` tells hold all rows.
    """
    box = axes.get_position()
    page_width, page_height = axes.figure.get_size_inches()
    width, height = box.width * page_width, box.height * page_height
    axes.set(xlim=(0, width), ylim=(height, 0))  # data units are inches, counted downwards
    axes.set_axis_off()
    unit = size / POINTS_PER_INCH
    for text, share, line, left, box_width in _boxes(words, width, size):
        ground, ink = word_colours(share)
        top = line * _row_height(size, values)
        axes.add_patch(
            FancyBboxPatch(
                (left, top + 0.06 * unit), box_width, 1.46 * unit, mutation_aspect=1, facecolor=ground,
                edgecolor="none", boxstyle=f"round,pad=0,rounding_size={0.28 * unit}",
            )
        )  # fmt: skip
        centre = left + box_width / 2
        style = {"ha": "center", "va": "baseline", "fontfamily": FONT, "parse_math": False}
        axes.text(centre, top + 1.13 * unit, text, fontsize=size, color=ink, **style)
        if values:
            axes.text(
                centre, top + 2.15 * unit, f"{share:.2f}", fontsize=_VALUE_SIZE * size, color=FAINT, **style
            )
