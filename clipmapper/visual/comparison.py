"""All methods' explanations of one answer side by side."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from clipmapper.visual.heatmap import (
    check_mask,
    colour_key,
    for_display,
    heat_scale,
    heatmap_overlay,
    outline_region,
    region_key,
    show_image,
)
from clipmapper.visual.layout import (
    CAPTION_SIZE,
    FAINT,
    INK,
    Header,
    axes_at,
    house_style,
    new_figure,
    text_width,
    write,
)
from clipmapper.visual.words import draw_words, word_scale, words_height

_MARGIN, _GAP = 0.28, 0.20
_PANEL_WIDTH, _PANEL_HEIGHT = 1.9, 2.4  # a picture fills one of the two
_CAPTION = 0.24  # line above a picture
_WORD_SIZE = 7.5
_MOST_COLUMNS = 5
_FOOTER_WIDTH = 6.6  # the legends below all rows


@house_style()
def plot_method_comparison(
    image: UInt8[np.ndarray, "height width 3"],
    relevance: Mapping[str, Float[np.ndarray, "_rows _columns"]],
    words: Mapping[str, Sequence[tuple[str, float]]],
    *,
    question: str,
    answer: str | None = None,
    truth: str | None = None,
    deciding_mask: Bool[np.ndarray, "height width"] | None = None,
) -> Figure:
    """The image, then one heat map per method with its coloured words below, in the order of `relevance`.

    `relevance` and `words` are keyed by the method's name and must have the same keys (ValueError). Every
    heat map and every row of words is divided by its own maximum: colours compare places within a method,
    not amounts between methods. Without `answer`, `question` is any text above the maps (a caption). `truth`
    and `deciding_mask` as in `plot_explanation`.
    """
    if not relevance or set(relevance) != set(words):
        raise ValueError(f"relevance has methods {sorted(relevance)}, words has {sorted(words)}")
    check_mask(image, deciding_mask)
    height, width = image.shape[:2]
    scale = min(_PANEL_WIDTH / width, _PANEL_HEIGHT / height)
    panel_width, panel_height = scale * width, scale * height
    # Words need some room below a narrow picture, and methods' names must not run into each other.
    cell_width = max(panel_width, 1.3, *(text_width(name, CAPTION_SIZE, "bold") for name in relevance))

    cells = len(relevance) + 1
    columns = math.ceil(cells / math.ceil(cells / _MOST_COLUMNS))
    methods = list(relevance)
    rows = [[None, *methods][start : start + columns] for start in range(0, cells, columns)]
    page_width = max(columns * cell_width + (columns - 1) * _GAP, _FOOTER_WIDTH) + 2 * _MARGIN
    header = Header(page_width - 2 * _MARGIN, question, answer, truth=truth)
    below = [
        max(words_height(words[method], cell_width, _WORD_SIZE) for method in row if method is not None)
        if any(row)
        else 0.0
        for row in rows
    ]
    row_heights = [_CAPTION + panel_height + 0.06 + words_tall + 0.12 for words_tall in below]
    footer = 0.16
    page_height = _MARGIN + header.height + 0.12 + sum(row_heights) + footer + _MARGIN
    figure = new_figure(page_width, page_height)
    header.write(figure, _MARGIN, _MARGIN - 0.04)

    picture = for_display(image)
    top = _MARGIN + header.height + 0.12
    for row, words_tall, row_height in zip(rows, below, row_heights, strict=True):
        panels_top = top + _CAPTION
        for column, method in enumerate(row):
            left = _MARGIN + column * (cell_width + _GAP)
            panel = axes_at(figure, left, panels_top, panel_width, panel_height)
            overlay = picture if method is None else heatmap_overlay(picture, relevance[method])
            show_image(panel, overlay)
            if deciding_mask is not None:
                outline_region(panel, deciding_mask, picture.shape[:2], 1.1 if method is None else 0.7)
            caption = "image" if method is None else method
            weight, colour = ("normal", FAINT) if method is None else ("bold", INK)
            write(figure, left, panels_top - 0.06, caption, CAPTION_SIZE, colour=colour, weight=weight)
            if method is not None and words[method]:
                area = axes_at(figure, left, panels_top + panel_height + 0.06, cell_width, words_tall)
                draw_words(area, words[method], _WORD_SIZE)
        top += row_height

    baseline = page_height - _MARGIN
    right = page_width - _MARGIN
    if any(words.values()):
        right = colour_key(figure, right, baseline, word_scale(), "words") - 0.25
    right = colour_key(figure, right, baseline, heat_scale(), "relevance ÷ maximum: patches") - 0.25
    if deciding_mask is not None:
        region_key(figure, right, baseline)
    return figure
