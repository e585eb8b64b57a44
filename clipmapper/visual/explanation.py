"""One explained answer on one page: image, heat map and words of the question, by one method or by all."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from clipmapper.visual.heatmap import (
    HEAT_LABEL,
    WORD_LABEL,
    check_mask,
    colour_bar,
    colour_key,
    draw_words,
    for_display,
    heat_scale,
    heatmap_overlay,
    outline_region,
    region_key,
    show_image,
    word_scale,
    words_height,
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

_MARGIN, _GAP = 0.28, 0.22
_PANEL_WIDTH, _PANEL_HEIGHT = 3.1, 3.9  # a picture fills one of the two
_LEAST_WIDTH, _LEAST_HEIGHT = 1.8, 1.3  # so that the captions and the colour bar's label have room
_BAR = 0.62  # colour bar with its ticks and label
_CAPTION = 0.26  # line above a picture
_WORD_SIZE = 11.0


@house_style()
def plot_explanation(
    image: UInt8[np.ndarray, "height width 3"],
    relevance: Float[np.ndarray, "rows columns"],
    words: Sequence[tuple[str, float]],
    *,
    question: str,
    answer: str,
    score: float,
    method: str,
    truth: str | None = None,
    deciding_mask: Bool[np.ndarray, "height width"] | None = None,
) -> Figure:
    """The image, the relevance of its patches as a heat map over it, and the coloured words of the question.

    `image` is the picture as the model saw it, `relevance` the patch grid, `words` (word, relevance) in the
    order of the question. The heat map and the words are each divided by their own maximum. With `truth`
    the title says whether the answer agrees with it (ignoring case); `deciding_mask` marks the pixels that
    decide the answer, where they are known. Nothing is cut: long texts wrap and the figure grows.
    """
    check_mask(image, deciding_mask)
    height, width = image.shape[:2]
    scale = min(_PANEL_WIDTH / width, _PANEL_HEIGHT / height)
    panel_width, panel_height = scale * width, scale * height
    cell_width, cell_height = max(panel_width, _LEAST_WIDTH), max(panel_height, _LEAST_HEIGHT)
    page_width = max(2 * cell_width + _GAP + _BAR, 5.4) + 2 * _MARGIN
    text_width = page_width - 2 * _MARGIN

    header = Header(text_width, question, answer, score, truth)
    panels_top = _MARGIN + header.height + 0.10 + _CAPTION
    words_top = panels_top + cell_height + 0.20 + _CAPTION
    words_tall = words_height(words, text_width, _WORD_SIZE, values=True)
    bottom = words_top + words_tall if words else panels_top + cell_height
    figure = new_figure(page_width, bottom + _MARGIN)

    header.write(figure, _MARGIN, _MARGIN - 0.04)
    picture = for_display(image)
    right = _MARGIN + cell_width + _GAP
    plain = axes_at(figure, _MARGIN, panels_top, panel_width, panel_height)
    heat = axes_at(figure, right, panels_top, panel_width, panel_height)
    show_image(plain, picture)
    show_image(heat, heatmap_overlay(picture, relevance))
    write(figure, _MARGIN, panels_top - 0.07, "image", CAPTION_SIZE, colour=FAINT)
    write(figure, right, panels_top - 0.07, f"relevance of patches: {method}", CAPTION_SIZE, colour=FAINT)
    if deciding_mask is not None:
        outline_region(plain, deciding_mask, picture.shape[:2], 1.3)
        outline_region(heat, deciding_mask, picture.shape[:2], 0.8)
        region_key(figure, _MARGIN + cell_width, panels_top - 0.07)
    bar = axes_at(figure, right + panel_width + 0.09, panels_top, 0.11, cell_height)
    colour_bar(bar, heat_scale(), HEAT_LABEL)

    if words:
        write(figure, _MARGIN, words_top - 0.10, "relevance of words", CAPTION_SIZE, colour=FAINT)
        colour_key(figure, page_width - _MARGIN, words_top - 0.10, word_scale(), WORD_LABEL)
        area = axes_at(figure, _MARGIN, words_top, text_width, words_tall)
        draw_words(area, words, _WORD_SIZE, values=True)
    return figure


_BETWEEN = 0.20
_SMALL_WIDTH, _SMALL_HEIGHT = 1.9, 2.4  # a picture fills one of the two
_NAME_LINE = 0.24  # line above a picture
_SMALL_WORDS = 7.5
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
    scale = min(_SMALL_WIDTH / width, _SMALL_HEIGHT / height)
    panel_width, panel_height = scale * width, scale * height
    # Words need some room below a narrow picture, and methods' names must not run into each other.
    cell_width = max(panel_width, 1.3, *(text_width(name, CAPTION_SIZE, "bold") for name in relevance))

    cells = len(relevance) + 1
    columns = math.ceil(cells / math.ceil(cells / _MOST_COLUMNS))
    methods = list(relevance)
    rows = [[None, *methods][start : start + columns] for start in range(0, cells, columns)]
    page_width = max(columns * cell_width + (columns - 1) * _BETWEEN, _FOOTER_WIDTH) + 2 * _MARGIN
    header = Header(page_width - 2 * _MARGIN, question, answer, truth=truth)
    below = [
        max(words_height(words[method], cell_width, _SMALL_WORDS) for method in row if method is not None)
        if any(row)
        else 0.0
        for row in rows
    ]
    row_heights = [_NAME_LINE + panel_height + 0.06 + words_tall + 0.12 for words_tall in below]
    footer = 0.16
    page_height = _MARGIN + header.height + 0.12 + sum(row_heights) + footer + _MARGIN
    figure = new_figure(page_width, page_height)
    header.write(figure, _MARGIN, _MARGIN - 0.04)

    picture = for_display(image)
    top = _MARGIN + header.height + 0.12
    for row, words_tall, row_height in zip(rows, below, row_heights, strict=True):
        panels_top = top + _NAME_LINE
        for column, method in enumerate(row):
            left = _MARGIN + column * (cell_width + _BETWEEN)
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
                draw_words(area, words[method], _SMALL_WORDS)
        top += row_height

    baseline = page_height - _MARGIN
    right = page_width - _MARGIN
    if any(words.values()):
        right = colour_key(figure, right, baseline, word_scale(), "words") - 0.25
    right = colour_key(figure, right, baseline, heat_scale(), "relevance ÷ maximum: patches") - 0.25
    if deciding_mask is not None:
        region_key(figure, right, baseline)
    return figure
