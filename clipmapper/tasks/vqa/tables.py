"""The tables that a run on questions ends with."""

from collections.abc import Mapping

from rich.table import Table

from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES, SCORES
from clipmapper.training.tables import Areas, areas_table, interval_name


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
        Areas(f"{m} {d}", d, results["perturbation"][m][d][score], SCORES[score].factor) for m, d in panels
    ]
    return areas_table(f"Perturbation: area under {SCORES[score].title}, {interval_name(results)}", columns)


def localisation_table(results: Mapping) -> Table | None:
    """Relevance against the truth about what decides the answer."""
    found = results["localisation"]
    if not found:
        return None
    table = Table(title=f"Localisation against the truth (%), {interval_name(results)}", title_justify="left")
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
