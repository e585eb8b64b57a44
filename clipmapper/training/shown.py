"""Things that a run shows: tables on the console; pictures, pages and tables in words of no logger."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from clipmapper.errors import visible
from clipmapper.evaluation.perturbation_scores import SCORES


@dataclass(frozen=True)
class Picture:
    """A picture in a file of the run, or its pixels."""

    source: Path | UInt8[np.ndarray, "height width 3"]

    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels, whichever way they were given."""
        if not isinstance(self.source, Path):
            return np.asarray(self.source)
        with Image.open(self.source) as image:
            return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Html:
    """A piece of a page."""

    code: str


Cell = Picture | Html | str | int | float | bool | None


@dataclass(frozen=True)
class MediaTable:
    """Rows with a cell for every column; there may be none."""

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]


Media = Mapping[str, Picture | MediaTable]  # by the name that a logger shows


def pictures_in(media: Media) -> Iterator[tuple[str, Picture]]:
    """All pictures; those of a table are called ``table/row/column``."""
    for name, shown in media.items():
        if isinstance(shown, Picture):
            yield name, shown
            continue
        for number, row in enumerate(shown.rows):
            for column in shown.columns:
                if isinstance(row[column], Picture):
                    yield f"{name}/{number:02d}/{column}", row[column]


class PlainConsole(Console):
    """Whatever is printed is shown as it is, be it a path, an answer or a caption of somebody else's.

    Square brackets and colons are no markup and no emoji, and control characters are written out
    (:func:`clipmapper.errors.visible`): what is bold is a :class:`rich.text.Text` of ours.
    """

    def __init__(self, **options) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, *arguments, **options) -> Iterable[Segment]:
        # Texts that were made elsewhere pass here; rich's own colours are no text but a segment's style.
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


_WIDTH = 110  # columns, where the output is no terminal


class Areas(NamedTuple):
    """A column: areas of every method."""

    header: str
    direction: str
    entries: Mapping[str, Mapping]
    factor: int


def console() -> PlainConsole:
    plain = PlainConsole()
    return plain if plain.is_terminal else PlainConsole(width=_WIDTH)


def areas_table(title: str, columns: Sequence[Areas], unchanged: Collection[str] = ()) -> Table:
    """Areas with intervals, the best of each column in bold, and paired differences to ``weighted``.

    ``unchanged``: the methods that are marked, for they do not depend on what the model has learnt.
    """
    table = Table(title=title, title_justify="left", min_width=min(len(title), _WIDTH))
    table.add_column("method")
    for column in columns:
        arrow = "↓" if column.direction == "positive" else "↑"
        table.add_column(f"{column.header} {arrow}", justify="right")
    for method in columns[0].entries:
        cells = []
        for column in columns:
            area, factor = column.entries[method]["area"], column.factor
            means = [entry["area"]["mean"] for entry in column.entries.values()]
            best = min(means) if column.direction == "positive" else max(means)
            digits = 1 if factor == 100 else 2
            mean, low, high = (f"{factor * area[key]:.{digits}f}" for key in ("mean", "low", "high"))
            text = f"{mean} [{low}, {high}]"
            difference = column.entries[method].get("difference_to_weighted")
            if difference is not None and difference["low"] <= 0 <= difference["high"]:
                text += " ="
            cells.append(Text(text, style="bold" if area["mean"] == best else ""))
        table.add_row(_marked(method, unchanged), *cells)
    table.caption = _CAPTION + _unchanged_line(unchanged)
    table.caption_justify = "left"
    return table


_CAPTION = "bold: best; = : not significantly different from weighted (paired interval holds 0)"
_COLUMNS = 4  # of a table of scores, so that a line holds them


def _marked(method: str, unchanged: Collection[str]) -> str:
    return f"{method} †" if method in unchanged else method


def _unchanged_line(unchanged: Collection[str]) -> str:
    return "\n† : hardly changes when the model's weights are randomised (sanity)" if unchanged else ""


def score_tables(numbers: Mapping) -> list[Table]:
    """The scores of explanations but removal (``numbers``: of :meth:`Report.numbers`), a few columns a table;
    of a sanity check its end, where nothing of the model is left."""
    tables = []
    unchanged = numbers.get("unchanged", ())
    for score, quantities in numbers["scores"].items():
        for title, shown in _grouped(score, quantities).items():
            for start in range(0, len(shown), _COLUMNS):
                columns = dict(list(shown.items())[start : start + _COLUMNS])
                table = Table(title=f"{title}, {interval_name(numbers)}", title_justify="left")
                table.add_column("method")
                for name, quantity in columns.items():
                    unit = " (%)" if quantity["factor"] == 100 else ""
                    arrow = "↓" if quantity["better"] == "low" else "↑"
                    table.add_column(f"{name}{unit} {arrow}", justify="right")
                for method in next(iter(columns.values()))["methods"]:
                    cells = [_value_cell(quantity, method) for quantity in columns.values()]
                    table.add_row(_marked(method, unchanged), *cells)
                table.caption = _CAPTION + _unchanged_line(unchanged)
                table.caption_justify = "left"
                tables.append(table)
    return tables


def _grouped(score: str, quantities: Mapping[str, Mapping]) -> dict[str, dict[str, Mapping]]:
    """Title → column → quantity. Areas under curves have a title for each score of the model's output."""
    groups: dict[str, dict[str, Mapping]] = {}
    for name, quantity in quantities.items():
        if quantity["better"] == "neither" or (score == "sanity" and not name.endswith("/all")):
            continue
        *where, last = name.split("/")
        if last in SCORES:
            title, column = f"{score}, area under {SCORES[last].title}", " ".join(where)
        else:
            title, column = score, name.replace("/", " ").replace("_", " ")
        groups.setdefault(title, {})[column] = quantity
    return groups


def _value_cell(quantity: Mapping, method: str) -> Text:
    entries, factor = quantity["methods"], quantity["factor"]
    means = [entry["value"]["mean"] for entry in entries.values()]
    best = min(means) if quantity["better"] == "low" else max(means)
    digits = 1 if factor == 100 else 3
    mean, low, high = (f"{factor * entries[method]['value'][k]:.{digits}f}" for k in ("mean", "low", "high"))
    difference = entries[method].get("difference_to_weighted")
    same = difference is not None and difference["low"] <= 0 <= difference["high"]
    style = "bold" if entries[method]["value"]["mean"] == best else ""
    return Text(f"{mean} [{low}, {high}]{' =' if same else ''}", style=style)


def files_table(files: Mapping[str, str | Path]) -> Table:
    table = Table(title="Written", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("path", overflow="fold")
    for what, path in files.items():
        table.add_row(what, str(path))
    return table


def mean_in_percent(value: Mapping, results: Mapping) -> str:
    """A mean, and half of its interval; one sample has none."""
    half = "" if results["samples"] == 1 else f" ± {50 * (value['high'] - value['low']):.1f}"
    return f"{100 * value['mean']:.1f}{half}"


def interval_name(results: Mapping) -> str:
    """The confidence of the results, as titles name it."""
    return f"{100 * results['confidence']:g} % interval"
