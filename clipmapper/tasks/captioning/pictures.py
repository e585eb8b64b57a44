"""Pictures and tables of an explanation report on captions."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.table import Table

from clipmapper.evaluation.perturbation_scores import DIRECTIONS, LOG_PROBABILITY, SCORES, WORD_PROBABILITY
from clipmapper.training.explained import Report
from clipmapper.training.shown import Areas, areas_table, interval_name, mean_in_percent
from clipmapper.visual.explanation import plot_method_comparison


def comparison_figure(report: Report, number: int) -> Figure:
    """The maps of the whole caption of an image, by all methods."""
    its = {method: explained[number] for method, explained in report.explanations.items()}
    first = next(iter(its.values()))
    maps = {method: explanation.patches for method, explanation in its.items()}
    return plot_method_comparison(first.image, maps, {method: [] for method in maps}, question=first.caption)


def caption_perturbation_tables(results: Mapping) -> list[Table]:
    """The same of captions: probabilities in one table, the scores of what is written in others."""
    found = results["perturbation"]
    if not found:
        return []
    written = [score for score in found["caption"]["positive"] if score != LOG_PROBABILITY]
    chosen = [("caption", LOG_PROBABILITY)] if LOG_PROBABILITY in found["caption"]["positive"] else []
    groups = [[*chosen, ("word", WORD_PROBABILITY)]]
    groups += [[("caption", score) for score in written[i : i + 2]] for i in range(0, len(written), 2)]
    tables = []
    for group in groups:
        columns = [
            Areas(f"{test} {d}", d, found[test][d][score], SCORES[score].factor)
            for test, score in group
            for d in DIRECTIONS
        ]
        names = ", ".join(f"{SCORES[score].title} of the {test}" for test, score in group)
        title = f"Perturbation: area under {names}, {interval_name(results)}"
        tables.append(areas_table(title, columns, results.get("unchanged", ())))
    return tables


def word_localisation_table(results: Mapping) -> Table | None:
    """Share of the relevance of a word's patches that lies on what the word speaks of."""
    found = results["localisation"]
    if not found:
        return None
    title = f"Words against what they speak of: mass on it (%), median in brackets, {interval_name(results)}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    for kind in found:
        table.add_column(kind, justify="right")
    for method in next(iter(found.values()))["methods"]:
        cells = []
        for kind in found.values():
            value = kind["methods"][method]["mass"]
            cells.append(f"{mean_in_percent(value, results)} ({100 * value['median']:.1f})")
        table.add_row(method, *cells)
    baseline = (f"{100 * kind['area_baseline']:.1f}" for kind in found.values())
    table.add_section()
    table.add_row("uniform map", *baseline)
    return table
