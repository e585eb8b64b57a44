"""Placing text and panels on a page in inches, so that no text runs over a picture; writing the page.

Every figure here is laid out by hand: texts are measured first, the height they need is added up, and only
then is the figure made. Matplotlib's automatic layouts do not wrap text and do not know how high a wrapped
text will be. Figures are built without pyplot: nothing global is changed and no window system is needed.
"""

import contextlib
import hashlib
import os
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from clipmapper.errors import UserError

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


# No dates and versions inside: the same figure gives the same bytes.
_METADATA = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None, "Creator": None}}


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG (or PDF, for papers), by the path's suffix; folders are made as needed.

    The file appears whole or not at all: it is written under a temporary name and then renamed.
    Raises UserError for another suffix and where the path cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise UserError(f"cannot write a picture to '{path}': the name must end in .png or .pdf")
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # however long the name itself is
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(partial, format=suffix[1:], metadata=_METADATA[suffix])
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write a picture to '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


_DIGITS = 8  # of the digest: of 10,000 texts two are alike once in a hundred times, if their letters are too


def readable_part(text: str, longest: int, parted: str = "-") -> str:
    """Letters and digits of every script, in lower case, ``parted`` by what is none.

    At most ``longest`` bytes in UTF-8, the measure of file systems; it may be empty, and different texts may
    have the same.
    """
    kept = "".join(
        c if unicodedata.category(c)[0] in "LMN" else " "
        for c in unicodedata.normalize("NFC", text.lower())
        if c.isprintable() or c.isspace()
    )
    cut = parted.join(kept.split()).encode("utf-8", "ignore")[:longest].decode("utf-8", "ignore")
    return cut.strip(parted)


def picture_name(*texts: str, apart: str = "") -> str:
    """A name without an ending: the texts, and a digest of what they are exactly.

    By the digest different texts have different names on any file system, such as one without capitals.

    ``apart``: what else two pictures may differ in, for the digest alone.
    """
    exact = "\0".join([*texts, apart]).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(exact, digest_size=_DIGITS // 2).hexdigest()
    parts = [part for text in texts if (part := readable_part(text, 120 // len(texts)))]
    return "_".join(parts or ["image"]) + f"-{digest}"
