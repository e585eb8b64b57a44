"""Pictures of an explanation report on captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from clipmapper.evaluation.perturbation_scores import DIRECTIONS
from clipmapper.evaluation.score_names import LOG_PROBABILITY, SCORES, WORD_PROBABILITY
from clipmapper.training.explained import Report
from clipmapper.training.media import Html, Media, MediaTable, Picture
from clipmapper.training.tables import Areas, areas_table, interval_name
from clipmapper.visual.caption_strip import plot_caption_strip
from clipmapper.visual.comparison import plot_method_comparison
from clipmapper.visual.curves import plot_perturbation_curves
from clipmapper.visual.files import save_figure
from clipmapper.visual.words import words_html


def write_pictures(report: Report, folder: Path, *, count: int, confidence: float) -> list[Path]:
    """Strips of the first ``count`` images, one comparison of methods, and the perturbation curves."""
    written = []
    first = next(iter(report.explanations.values()))
    for number in range(min(count, len(report.samples))):
        path = folder / f"explanation_{number:02d}_caption.png"
        truth = report.samples.references[number][0]
        written.append(save_figure(plot_caption_strip(first[number], truth=truth), path))
    if count:
        maps = {method: its[0].patches for method, its in report.explanations.items()}
        figure = plot_method_comparison(
            first[0].image, maps, {method: [] for method in maps}, question=first[0].caption
        )
        written.append(save_figure(figure, folder / "methods.png"))
    for score in (*report.caption_scores.scores, *report.word_scores.scores):
        written.append(save_figure(_curves(report, score, confidence), folder / f"perturbation_{score}.png"))
    return written


def report_media(report: Report, folder: Path) -> Media:
    """The pictures that :func:`write_pictures` left in ``folder``, and a table of samples."""
    explained = next(iter(report.explanations.values()))
    columns = ["image", "word by word", "caption", "references", "curves"]
    rows = []
    for path in sorted(folder.glob("explanation_*_caption.png")):
        number = int(path.stem.split("_")[1])
        curves = folder / "curves" / f"{path.stem}.png"
        save_figure(_sample_curves(report, number), curves)
        its = explained[number]
        cells = (
            Picture(its.image),
            Picture(path),
            Html(words_html(list(zip(its.words, its.weights.tolist(), strict=True)))),
            "\n".join(report.samples.references[number]),
            Picture(curves),
        )
        rows.append(dict(zip(columns, cells, strict=True)))
    media: dict[str, Picture | MediaTable] = {"explanations": MediaTable(columns, rows)}
    for path in [folder / "methods.png", *sorted(folder.glob("perturbation_*.png"))]:
        if path.exists():
            media[f"pictures/{path.stem}"] = Picture(path)
    return media


def _curves(report: Report, score: str, confidence: float):
    word = score in report.word_scores.scores
    scores = report.word_scores if word else report.caption_scores
    what = "one word a caption, by its map" if word else "by the caption's map"
    areas = scores.areas(score).mean(axis=-1)[0]
    return plot_perturbation_curves(
        scores.curves(score, confidence=confidence),
        scores.fractions.tolist(),
        ylabel=SCORES[score].axis,
        areas={
            f"image/{direction}": {m: float(areas[j, k]) for k, m in enumerate(scores.methods)}
            for j, direction in enumerate(DIRECTIONS)
        },
        title=f"Perturbation test, {len(report.samples)} captions ({what})",
    )


def _sample_curves(report: Report, number: int):
    """The curves of one sample (an interval of one sample is the sample itself)."""
    scores = report.caption_scores
    values: Sequence = scores.values[0][0]
    curves = {}
    for j, direction in enumerate(DIRECTIONS):
        lines = {m: np.asarray(values[j, k, number]) for k, m in enumerate(scores.methods)}
        curves[f"image/{direction}"] = {m: (line, line, line) for m, line in lines.items()}
    label = SCORES[scores.scores[0]].axis
    return plot_perturbation_curves(curves, scores.fractions.tolist(), ylabel=label)


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
            Areas(f"{test} {d}", d, found[test][d][score], SCORES[score].factor)
            for test, score in group
            for d in DIRECTIONS
        ]
        names = ", ".join(f"{SCORES[score].title} of the {test}" for test, score in group)
        tables.append(areas_table(f"Perturbation: area under {names}, {interval_name(results)}", columns))
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
            half = (value["high"] - value["low"]) / 2
            cells.append(f"{100 * value['mean']:.1f} ± {100 * half:.1f} ({100 * value['median']:.1f})")
        table.add_row(method, *cells)
    baseline = (f"{100 * kind['area_baseline']:.1f}" for kind in found.values())
    table.add_section()
    table.add_row("uniform map", *baseline)
    return table
