"""Pictures and tables of an explanation report on answers."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from clipmapper.data.record import resized
from clipmapper.evaluation.localisation import LOCALISATION_SCORES
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES, SCORES
from clipmapper.training.explained import Report
from clipmapper.training.shown import Areas, areas_table, interval_name, mean_in_percent
from clipmapper.visual.explanation import plot_explanation, plot_method_comparison


def explanation_figure(report: Report, number: int) -> Figure:
    """The heat map of a question by the first method."""
    samples, (method, found) = report.samples, next(iter(report.relevance.items()))
    return plot_explanation(
        samples.pictures[number],
        found.patches[number],
        found.words[number],
        question=samples.questions[number],
        answer=report.predictions[number],
        score=report.probabilities[number],
        method=method,
        truth=samples.truths[number],
        deciding_mask=_mask(report, number),
    )


def comparison_figure(report: Report, number: int) -> Figure:
    """All methods on a question."""
    samples = report.samples
    return plot_method_comparison(
        samples.pictures[number],
        {name: found.patches[number] for name, found in report.relevance.items()},
        {name: found.words[number] for name, found in report.relevance.items()},
        question=samples.questions[number],
        answer=report.predictions[number],
        truth=samples.truths[number],
        deciding_mask=_mask(report, number),
    )


def _mask(report: Report, number: int) -> np.ndarray | None:
    mask, picture = report.samples.masks[number], report.samples.pictures[number]
    return None if mask is None else resized(mask, picture.shape[:2])


def perturbation_table(results: Mapping, score: str = "accuracy") -> Table:
    """Areas with intervals, the best of each column in bold, and paired differences to ``weighted``."""
    panels = [(m, d) for m in MODALITIES for d in DIRECTIONS if m in results["perturbation"]]
    columns = [
        Areas(f"{m} {d}", d, results["perturbation"][m][d][score], SCORES[score].factor) for m, d in panels
    ]
    title = f"Perturbation: area under {SCORES[score].title}, {interval_name(results)}"
    return areas_table(title, columns, results.get("unchanged", ()))


def localisation_table(results: Mapping) -> Table | None:
    """Relevance against the truth about what decides the answer."""
    found = results["localisation"]
    if not found:
        return None
    table = Table(title=f"Localisation against the truth (%), {interval_name(results)}", title_justify="left")
    table.add_column("method")
    columns = [(modality, score) for modality in found for score in LOCALISATION_SCORES]
    for modality, score in columns:
        table.add_column(f"{modality} {score}", justify="right")
    for method in next(iter(found.values()))["methods"]:
        cells = []
        for modality, score in columns:
            value = found[modality]["methods"][method][score]
            cells.append(mean_in_percent(value, results))
        table.add_row(method, *cells)
    baseline = ", ".join(f"{m} {100 * v['area_baseline']:.1f}" for m, v in found.items())
    table.caption = f"a uniform map reaches (mass): {baseline}"
    table.caption_justify = "left"
    return table
