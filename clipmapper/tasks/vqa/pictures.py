"""Pictures of an explanation report on answers."""

from pathlib import Path

import numpy as np

from clipmapper.data.record import resized
from clipmapper.evaluation.perturbation_scores import SCORES
from clipmapper.tasks.vqa.perturbation import AnswerScorer
from clipmapper.training.explained import Report
from clipmapper.training.media import Html, Media, MediaTable, Picture
from clipmapper.visual.curves import plot_perturbation_curves
from clipmapper.visual.explanation import plot_explanation, plot_method_comparison
from clipmapper.visual.heatmap import words_html
from clipmapper.visual.layout import readable_part, save_figure

_NAME = 120  # bytes of a file's name that are a family's


def write_pictures(report: Report, folder: Path, *, count: int, confidence: float) -> list[Path]:
    """Heat maps of the first ``count`` samples, one comparison of methods, and the perturbation curves."""
    written = []
    first = next(iter(report.relevance))
    for number in range(min(count, len(report.samples))):
        # A family is any text that the data have, such as VQA v2's "yes/no".
        family = readable_part(report.samples.families[number], _NAME, "_")
        path = folder / "_".join(["explanation", f"{number:02d}", *([family] if family else [])])
        path = path.with_name(f"{path.name}.png")
        save_figure(_explanation(report, number, first), path)
        written.append(path)
    if count:
        path = folder / "methods.png"
        save_figure(_comparison(report, 0), path)
        written.append(path)
    for score in AnswerScorer.names:
        path = folder / f"perturbation_{score}.png"
        save_figure(_curves(report, score, confidence), path)
        written.append(path)
    return written


def report_media(report: Report, folder: Path) -> Media:
    """The pictures that :func:`write_pictures` left in ``folder``, and a table of samples."""
    method = next(iter(report.relevance))
    columns = ["image", "heat map", "question", "family", "answer", "truth", "probability", "curves"]
    rows = []
    samples = report.samples
    for path in sorted(folder.glob("explanation_*.png")):
        number = int(path.stem.split("_")[1])
        curves = folder / "curves" / f"{path.stem}.png"
        save_figure(_sample_curves(report, number), curves)
        cells = (
            Picture(samples.pictures[number]),
            Picture(path),
            Html(words_html(report.relevance[method].words[number])),
            samples.families[number],
            report.predictions[number],
            samples.truths[number],
            report.probabilities[number],
            Picture(curves),
        )
        rows.append(dict(zip(columns, cells, strict=True)))
    media: dict[str, Picture | MediaTable] = {"explanations": MediaTable(columns, rows)}
    for name in ("methods", "perturbation_accuracy", "perturbation_probability"):
        if (folder / f"{name}.png").exists():
            media[f"pictures/{name}"] = Picture(folder / f"{name}.png")
    return media


def _explanation(report: Report, number: int, method: str):
    samples, found = report.samples, report.relevance[method]
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


def _comparison(report: Report, number: int):
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


def _curves(report: Report, score: str, confidence: float):
    scores = report.perturbation
    areas = scores.areas(score).mean(axis=-1)
    table = {
        f"{modality}/{direction}": {m: float(areas[i, j, k]) for k, m in enumerate(scores.methods)}
        for i, modality in enumerate(scores.modalities)
        for j, direction in enumerate(("positive", "negative"))
    }
    return plot_perturbation_curves(
        scores.curves(score, confidence=confidence),
        scores.fractions.tolist(),
        ylabel=SCORES[score].axis,
        areas=table,
        title=f"Perturbation test, {len(report.samples)} questions",
    )


def _sample_curves(report: Report, number: int):
    """The probability curves of one sample (an interval of one sample is the sample itself)."""
    scores = report.perturbation
    values = scores.score("probability")
    curves = {}
    for i, modality in enumerate(scores.modalities):
        for j, direction in enumerate(("positive", "negative")):
            lines = {m: np.asarray(values[i, j, k, number]) for k, m in enumerate(scores.methods)}
            curves[f"{modality}/{direction}"] = {m: (line, line, line) for m, line in lines.items()}
    return plot_perturbation_curves(curves, scores.fractions.tolist(), ylabel=SCORES["probability"].axis)
