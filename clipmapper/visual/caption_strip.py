"""An explained caption on one page: the map of the whole caption, and a strip with a small map a word."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from clipmapper.visual.heatmap import (
    colour_key,
    draw_words,
    for_display,
    heat_scale,
    heatmap_overlay,
    show_image,
    word_scale,
    words_height,
)
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

_MARGIN, _GAP, _ROW_GAP = 0.28, 0.16, 0.20
_CELL_WIDTH, _CELL_HEIGHT = 1.22, 1.5  # a small picture fills one of the two
_LARGE_WIDTH, _LARGE_HEIGHT = 2.6, 3.0
_CAPTION = 0.24  # line above a picture
_LABEL = 0.25  # the explained word below its picture
_TITLE_SIZE, _WORD_SIZE, _EARLIER_SIZE = 12.0, 9.5, 5.8
_MOST_COLUMNS = 8
_FOOTER = 0.22
_SIDE_WIDTH = 3.6  # of the caption beside the large pictures, at least
_HOW = {
    "mean": "mean of its words' maps, stop-words left out",
    "cider": "its words' maps, weighed by the CIDEr that is lost without the word",
    "clip": "its words' maps, weighed by the CLIPScore that is lost without the word",
}
_PUT_TOGETHER = {
    "scaled": ", each scaled to sum 1",
    "raw": "",
    "root": ", the roots of each, scaled to sum 1",
    "largest": ", of each patch the largest, each map scaled to sum 1",
    "coverage": ", what each patch adds to those before it",
}


@runtime_checkable
class Explained(Protocol):
    """The parts of an explained caption that are drawn: its words, their maps, probabilities and weights."""

    caption: str
    words: tuple[str, ...]
    explained: tuple[int, ...]
    maps: Float[np.ndarray, "explained rows columns"]
    probabilities: Float[np.ndarray, "explained"]
    weights: Float[np.ndarray, "explained"]
    word_weights: str
    word_maps: str
    image: UInt8[np.ndarray, "height width 3"]
    method: str

    @property
    def patches(self) -> Float[np.ndarray, "rows columns"]: ...

    def earlier_words(self, row: int) -> list[tuple[str, float]]: ...


@house_style()
def plot_caption_strip(of: Explained, *, truth: str | None = None) -> Figure:
    """The image, the map of the caption, and below them a small map of every explained word.

    Under each map stands its word, with the probability that the model gave it; words that do not count in
    the caption's map are faint. Below that come the words written before it, coloured by their relevance.
    Each map and each row of earlier words is divided by its own maximum. Punctuation marks have no map here,
    unless nothing else was explained. ``truth``: a caption by someone who knows. Nothing is cut: the strip
    wraps into rows and the figure grows.
    """
    image = of.image
    shown = [row for row, place in enumerate(of.explained) if _is_word(of.words[place])]
    shown = shown or list(range(len(of.explained)))
    words = [of.words[of.explained[row]] for row in shown]
    earlier = [[pair for pair in of.earlier_words(row) if _is_word(pair[0])] for row in shown]
    height, width = image.shape[:2]
    scale = min(_CELL_WIDTH / width, _CELL_HEIGHT / height)
    cell_width, cell_height = scale * width, scale * height
    large = min(_LARGE_WIDTH / width, _LARGE_HEIGHT / height)
    large_width, large_height = large * width, large * height

    slot = max(cell_width, *(text_width(word, _WORD_SIZE, "bold") for word in words)) + _GAP
    rows = -(-len(words) // _MOST_COLUMNS)
    columns = -(-len(words) // rows)
    page_width = max(columns * slot - _GAP, 2 * large_width + 2 * _GAP + _SIDE_WIDTH) + 2 * _MARGIN
    columns = min(len(words), int((page_width - 2 * _MARGIN + _GAP + 1e-6) // slot))
    slot = max(slot, (page_width - 2 * _MARGIN + _GAP) / max(columns, 6))
    starts = range(0, len(words), columns)
    tall = [
        max(words_height(before, slot - _GAP, _EARLIER_SIZE) for before in earlier[start : start + columns])
        for start in starts
    ]
    strip_top = _MARGIN + _CAPTION + large_height + 0.30 + _CAPTION
    row_heights = [cell_height + _LABEL + words_tall + _ROW_GAP for words_tall in tall]
    page_height = strip_top + sum(row_heights) + _FOOTER + _MARGIN
    figure = new_figure(page_width, page_height)

    picture = for_display(image)
    top, left = _MARGIN + _CAPTION, _MARGIN
    for name, drawn in (("image", picture), ("the caption's map", heatmap_overlay(picture, of.patches))):
        show_image(axes_at(figure, left, top, large_width, large_height), drawn)
        write(figure, left, top - 0.07, name, CAPTION_SIZE, colour=FAINT)
        left += large_width + _GAP
    left += 0.12
    _write_side(figure, left, top, page_width - _MARGIN - left, of, truth)

    _line_of_strip(figure, strip_top - 0.09)
    y = strip_top
    for start, words_tall, row_height in zip(starts, tall, row_heights, strict=True):
        for column, k in enumerate(range(start, min(start + columns, len(words)))):
            x = _MARGIN + column * slot
            map_of_word = heatmap_overlay(picture, of.maps[shown[k]])
            show_image(axes_at(figure, x, y, cell_width, cell_height), map_of_word)
            label = y + cell_height + 0.17
            ink, weight = (INK, "bold") if of.weights[shown[k]] > 0 else (FAINT, "normal")
            write(figure, x, label, words[k], _WORD_SIZE, colour=ink, weight=weight)
            number = f"{of.probabilities[shown[k]]:.2f}"
            right = x + max(
                cell_width,
                text_width(words[k], _WORD_SIZE, weight) + text_width(f" {number}", _EARLIER_SIZE),
            )
            write(figure, right, label, number, _EARLIER_SIZE, colour=FAINT, align="right")
            if earlier[k]:
                area = axes_at(figure, x, y + cell_height + _LABEL, slot - _GAP, words_tall)
                draw_words(area, earlier[k], _EARLIER_SIZE)
        y += row_height

    baseline = page_height - _MARGIN
    right = page_width - _MARGIN
    if any(earlier):
        right = colour_key(figure, right, baseline, word_scale(), "earlier words") - 0.25
    colour_key(figure, right, baseline, heat_scale(), "relevance ÷ maximum: patches")
    return figure


def _is_word(text: str) -> bool:
    return any(letter.isalnum() for letter in text)


def _write_side(
    figure: Figure, left: float, top: float, width: float, of: Explained, truth: str | None
) -> None:
    """The caption and what the pictures show, beside them."""
    lines = wrap([Run(of.caption, weight="bold")], width, _TITLE_SIZE)
    write_lines(figure, left, top - 0.04, lines, _TITLE_SIZE)
    below = top + len(lines) * line_height(_TITLE_SIZE) + 0.10
    if len(of.explained) < len(of.words):
        how = "that of the one word that was chosen"
    else:
        how = _HOW[of.word_weights] + _PUT_TOGETHER[of.word_maps]
    notes = [[Run("truth:", FAINT), Run(truth)]] if truth is not None else []
    notes += [
        [Run("method:", FAINT), Run(of.method, weight="bold")],
        [Run("the caption's map:", FAINT), Run(how)],
    ]
    for note in notes:
        wrapped = wrap(note, width, CAPTION_SIZE)
        write_lines(figure, left, below, wrapped, CAPTION_SIZE)
        below += len(wrapped) * line_height(CAPTION_SIZE) + 0.05


def _line_of_strip(figure: Figure, baseline: float) -> None:
    text = "word by word: the word and its probability; below, the words written before it"
    write(figure, _MARGIN, baseline, text, CAPTION_SIZE, colour=FAINT)
