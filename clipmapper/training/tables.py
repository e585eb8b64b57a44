"""The tables that a run ends with."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES

_WIDTH = 110  # columns, where the output is no terminal


def console() -> Console:
    plain = Console(emoji=False)  # a path or a question may hold what rich reads as one
    return plain if plain.is_terminal else Console(width=_WIDTH, emoji=False)


def accuracy_table(accuracy: Mapping) -> Table:
    """Accuracy per family; ``accuracy`` as in results.json."""
    table = Table(title="Accuracy (%)", title_justify="left")
    for column in ("family", "questions", "validation", "held-out combinations", "blind", "chance"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, row in accuracy.items():
        cells = (row.get(key) for key in ("validation", "held_out", "blind", "chance"))
        percent = ["" if value is None else f"{100 * value:.1f}" for value in cells]
        style = "bold" if family == "overall" else None
        table.add_row(family.replace("_", " "), str(row["questions"]), *percent, style=style)
    return table


def perturbation_table(results: Mapping, score: str = "accuracy") -> Table:
    """Areas with intervals, the best of each column in bold, and paired differences to ``weighted``."""
    names = {"accuracy": "soft accuracy", "probability": "probability of the predicted answer"}
    title = f"Perturbation: area under {names[score]} (%), {_interval(results)}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    panels = [(m, d) for m in MODALITIES for d in DIRECTIONS if m in results["perturbation"]]
    for modality, direction in panels:
        table.add_column(f"{modality} {direction} {'↓' if direction == 'positive' else '↑'}", justify="right")
    columns = [results["perturbation"][m][d][score] for m, d in panels]
    for method in columns[0]:
        cells = []
        for (_, direction), column in zip(panels, columns, strict=True):
            area = column[method]["area"]
            means = [entry["area"]["mean"] for entry in column.values()]
            best = min(means) if direction == "positive" else max(means)
            text = f"{100 * area['mean']:.1f} [{100 * area['low']:.1f}, {100 * area['high']:.1f}]"
            difference = column[method].get("difference_to_weighted")
            if difference is not None and difference["low"] <= 0 <= difference["high"]:
                text += " ="
            cells.append(f"[bold]{escape(text)}[/bold]" if area["mean"] == best else escape(text))
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


def files_table(files: Mapping[str, str | Path]) -> Table:
    table = Table(title="Written", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("path", overflow="fold")
    for what, path in files.items():
        table.add_row(what, escape(str(path)))
    return table


def _interval(results: Mapping) -> str:
    return f"{100 * results['confidence']:g} % interval"
