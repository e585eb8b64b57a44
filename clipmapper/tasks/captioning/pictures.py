"""Pictures of an explanation report on captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipmapper.evaluation.perturbation_scores import DIRECTIONS, SCORES
from clipmapper.training.explained import Report
from clipmapper.training.media import Html, Media, MediaTable, Picture
from clipmapper.visual.caption_strip import plot_caption_strip
from clipmapper.visual.curves import plot_perturbation_curves
from clipmapper.visual.explanation import plot_method_comparison
from clipmapper.visual.heatmap import words_html
from clipmapper.visual.layout import save_figure


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
