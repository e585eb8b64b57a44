"""Placing text and panels on a page in inches, so that no text ever runs over a picture.

Every figure here is laid out by hand: texts are measured first, the height they need is added up, and only
then is the figure made. Matplotlib's automatic layouts do not wrap text and do not know how high a wrapped
text will be. Figures are built without pyplot: nothing global is changed and no window system is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

FONT = "DejaVu Sans"  # comes with matplotlib, and has the tick and the cross
DPI = 200
POINTS_PER_INCH = 72
CAPTION_SIZE = 8.5
INK = "#1a1a1a"
FAINT = "#6b6b6b"
# Measured as it is drawn: at other resolutions hinted letters have slightly other widths.
_MEASURE = RendererAgg(1, 1, DPI)


_DEFAULTS = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's own defaults for a while: a user's style sheet or rc file changes no figure made here."""
    # Type 42: journals refuse PDFs with matplotlib's default Type 3 fonts.
    with matplotlib.rc_context({**_DEFAULTS, "pdf.fonttype": 42}):
        yield


@dataclass(frozen=True)
class Run:
    """A piece of text in one style."""

    text: str
    colour: str = INK
    weight: str = "normal"


@lru_cache(maxsize=8192)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line of text in inches, for a font size in points."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    width, _, _ = _MEASURE.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / DPI


def break_word(word: str, available: float, size: float, weight: str = "normal") -> list[str]:
    """Cut a word that is wider than a line into pieces that fit (at least one character each)."""
    if text_width(word, size, weight) <= available:
        return [word]
    pieces, piece = [], ""
    for character in word:
        if piece and text_width(piece + character, size, weight) > available:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece]


def flow(widths: Sequence[float], available: float, gap: float) -> list[tuple[int, float]]:
    """Line number and left edge of each box when boxes are set one after the other like words."""
    places, line, left = [], 0, 0.0
    for width in widths:
        if left > 0 and left + width > available:
            line, left = line + 1, 0.0
        places.append((line, left))
        left += width + gap
    return places


def line_height(size: float) -> float:
    """Distance between two baselines in inches."""
    return 1.32 * size / POINTS_PER_INCH


def wrap(runs: Sequence[Run], available: float, size: float) -> list[list[tuple[float, Run]]]:
    """Lines of (left edge in inches, run), broken between words; white space in the texts is collapsed."""
    words = [
        Run(piece, run.colour, run.weight)
        for run in runs
        for word in run.text.split()
        for piece in break_word(word, available, size, run.weight)
    ]
    places = flow([text_width(w.text, size, w.weight) for w in words], available, text_width(" ", size))
    lines: list[list[tuple[float, Run]]] = []
    for word, (line, left) in zip(words, places, strict=True):
        if line == len(lines):
            lines.append([])
        lines[line].append((left, word))
    return [_joined(line) for line in lines]


def _joined(line: list[tuple[float, Run]]) -> list[tuple[float, Run]]:
    """Neighbours of one style become one text, so that the letters are spaced as the font means them."""
    joined: list[tuple[float, Run]] = []
    for left, word in line:
        if joined and (joined[-1][1].colour, joined[-1][1].weight) == (word.colour, word.weight):
            start, before = joined[-1]
            joined[-1] = (start, Run(f"{before.text} {word.text}", word.colour, word.weight))
        else:
            joined.append((left, word))
    return joined


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of the given size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches; `top` is counted from the upper edge of the figure, as one reads."""
    page_width, page_height = figure.get_size_inches()
    box = (left / page_width, 1 - (top + height) / page_height, width / page_width, height / page_height)
    return figure.add_axes(box)


def write(
    figure: Figure,
    left: float,
    baseline: float,
    text: str,
    size: float,
    *,
    colour: str = INK,
    weight: str = "normal",
    align: str = "left",
) -> None:
    """Write one line at a place in inches; `baseline` is counted from the upper edge of the figure."""
    page_width, page_height = figure.get_size_inches()
    # parse_math is off: "$5" in a question is money, not a formula.
    figure.text(
        left / page_width,
        1 - baseline / page_height,
        text,
        fontsize=size,
        color=colour,
        fontweight=weight,
        fontfamily=FONT,
        ha=align,
        va="baseline",
        parse_math=False,
    )


def write_lines(
    figure: Figure, left: float, top: float, lines: Sequence[list[tuple[float, Run]]], size: float
) -> None:
    """Write the lines that `wrap` returned, the first one directly below `top`."""
    for number, line in enumerate(lines):
        baseline = top + number * line_height(size) + size / POINTS_PER_INCH
        for offset, run in line:
            write(figure, left + offset, baseline, run.text, size, colour=run.colour, weight=run.weight)


_QUESTION_SIZE, _ANSWER_SIZE = 12.0, 10.0
_RIGHT, _WRONG = "#1b7a3d", "#b3261e"


class Header:
    """Question and answer (or a caption alone), wrapped to a width in inches; `height` is known before the
    figure is made."""

    def __init__(
        self,
        width: float,
        question: str,
        answer: str | None = None,
        score: float | None = None,
        truth: str | None = None,
    ) -> None:
        self._question = wrap([Run(question, weight="bold")], width, _QUESTION_SIZE)
        runs = [] if answer is None else _answer_runs(answer, score, truth)
        self._answer = wrap(runs, width, _ANSWER_SIZE)
        self._question_height = len(self._question) * line_height(_QUESTION_SIZE) + 0.05
        self.height = self._question_height + len(self._answer) * line_height(_ANSWER_SIZE)

    def write(self, figure: Figure, left: float, top: float) -> None:
        """Write the lines with their upper left corner at a place in inches."""
        write_lines(figure, left, top, self._question, _QUESTION_SIZE)
        write_lines(figure, left, top + self._question_height, self._answer, _ANSWER_SIZE)


def _answer_runs(answer: str, score: float | None, truth: str | None) -> Sequence[Run]:
    runs = [Run("answer:", FAINT), Run(answer, weight="bold")]
    if score is not None:
        runs.append(Run(f"(score {score:.3g})", FAINT))
    if truth is None:
        return runs
    agree = answer.strip().casefold() == truth.strip().casefold()
    mark = Run("✓", _RIGHT, "bold") if agree else Run("✗", _WRONG, "bold")
    return [*runs, Run("·  truth:", FAINT), Run(truth, weight="bold"), mark]
