"""The tables that a run ends with."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from clipmapper.errors import visible
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES
from clipmapper.tasks.captioning.perturbation import LOG_PROBABILITY, WORD_PROBABILITY


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


class _Score(NamedTuple):
    name: str
    factor: int  # 100: a share, shown in per cent


_SCORES = {
    "accuracy": _Score("soft accuracy (%)", 100),
    "probability": _Score("probability of the predicted answer (%)", 100),
    LOG_PROBABILITY: _Score("log-probability (nats)", 1),
    WORD_PROBABILITY: _Score("probability (%)", 100),
    **{f"bleu_{n}": _Score(f"BLEU-{n} (%)", 100) for n in range(1, 5)},
    "rouge_l": _Score("ROUGE-L (%)", 100),
    "cider": _Score("CIDEr-D", 1),
    "meteor": _Score("METEOR (%)", 100),
    "spice": _Score("SPICE (%)", 100),
}


class _Areas(NamedTuple):
    """A column: areas of every method."""

    header: str
    direction: str
    entries: Mapping[str, Mapping]
    factor: int


def console() -> PlainConsole:
    plain = PlainConsole()
    return plain if plain.is_terminal else PlainConsole(width=_WIDTH)


def accuracy_table(accuracy: Mapping) -> Table:
    """Accuracy per family; ``accuracy`` as in results.json."""
    table = Table(title="Accuracy (%)", title_justify="left")
    names = {"validation": "validation", "held_out": "held-out combinations", "blind": "blind"}
    names |= {"chance": "chance"}
    there = [key for key in names if any(row.get(key) is not None for row in accuracy.values())]
    for column in ("family", "questions", *(names[key] for key in there)):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, row in accuracy.items():
        cells = (row.get(key) for key in there)
        percent = ["" if value is None else f"{100 * value:.1f}" for value in cells]
        style = "bold" if family == "overall" else None
        table.add_row(family.replace("_", " "), str(row["questions"]), *percent, style=style)
    return table


def perturbation_table(results: Mapping, score: str = "accuracy") -> Table:
    """Areas with intervals, the best of each column in bold, and paired differences to ``weighted``."""
    panels = [(m, d) for m in MODALITIES for d in DIRECTIONS if m in results["perturbation"]]
    columns = [
        _Areas(f"{m} {d}", d, results["perturbation"][m][d][score], _SCORES[score].factor) for m, d in panels
    ]
    return _areas_table(f"Perturbation: area under {_SCORES[score].name}, {_interval(results)}", columns)


def caption_perturbation_tables(results: Mapping) -> list[Table]:
    """The same of captions: probabilities in one table, the scores of what is written in others."""
    found = results["perturbation"]
    written = [score for score in found["caption"]["positive"] if score != LOG_PROBABILITY]
    chosen = [("caption", LOG_PROBABILITY)] if LOG_PROBABILITY in found["caption"]["positive"] else []
    groups = [[*chosen, ("word", WORD_PROBABILITY)]]
    groups += [[("caption", score) for score in written[i : i + 2]] for i in range(0, len(written), 2)]
    tables = []
    for group in groups:
        columns = [
            _Areas(f"{test} {d}", d, found[test][d][score], _SCORES[score].factor)
            for test, score in group
            for d in DIRECTIONS
        ]
        names = ", ".join(f"{_SCORES[score].name} of the {test}" for test, score in group)
        tables.append(_areas_table(f"Perturbation: area under {names}, {_interval(results)}", columns))
    return tables


def _areas_table(title: str, columns: Sequence[_Areas]) -> Table:
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
        table.add_row(method, *cells)
    table.caption = "bold: best; = : not significantly different from weighted (paired interval holds 0)"
    table.caption_justify = "left"
    return table


def localisation_table(results: Mapping) -> Table | None:
    """Relevance against the truth about what decides the answer."""
    found = results["localisation"]
    if not found:
        return None
    table = Table(title=f"Localisation against the truth (%), {_interval(results)}", title_justify="left")
    table.add_column("method")
    for modality in found:
        for score in ("mass", "rank", "pointing"):
            table.add_column(f"{modality} {score}", justify="right")
    for method in next(iter(found.values()))["methods"]:
        cells = []
        for modality in found.values():
            for score in ("mass", "rank", "pointing"):
                value = modality["methods"][method][score]
                half = (value["high"] - value["low"]) / 2
                cells.append(f"{100 * value['mean']:.1f} ± {100 * half:.1f}")
        table.add_row(method, *cells)
    baseline = ", ".join(f"{m} {100 * v['area_baseline']:.1f}" for m, v in found.items())
    table.caption = f"a uniform map reaches (mass): {baseline}"
    table.caption_justify = "left"
    return table


def word_localisation_table(results: Mapping) -> Table | None:
    """Share of the relevance of a word's patches that lies on what the word speaks of."""
    found = results["localisation"]
    if not found:
        return None
    title = f"Words against what they speak of: mass on it (%), median in brackets, {_interval(results)}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    for kind in found:
        table.add_column(kind, justify="right")
    for method in next(iter(found.values()))["methods"]:
        cells = []
        for kind in found.values():
            value = kind["methods"][method]["mass"]
            half = (value["high"] - value["low"]) / 2
            cells.append(f"{100 * value['mean']:.1f} ± {100 * half:.1f} ({100 * value['median']:.1f})")
        table.add_row(method, *cells)
    baseline = (f"{100 * kind['area_baseline']:.1f}" for kind in found.values())
    table.add_section()
    table.add_row("uniform map", *baseline)
    return table


def files_table(files: Mapping[str, str | Path]) -> Table:
    table = Table(title="Written", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("path", overflow="fold")
    for what, path in files.items():
        table.add_row(what, str(path))
    return table


def _interval(results: Mapping) -> str:
    return f"{100 * results['confidence']:g} % interval"
