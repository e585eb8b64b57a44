"""What the callback and ``clipmapper perturb`` do with explanations of answers, and with those of
captions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from clipmapper.evaluation.numbers import LOCALISATION_SCORES
from clipmapper.evaluation.perturbation import FRACTIONS
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES
from clipmapper.tasks.captioning import pictures as caption_pictures
from clipmapper.tasks.captioning.report import CaptionReport, caption_report, curve_points
from clipmapper.tasks.captioning.samples import ExplainedCaptions
from clipmapper.tasks.vqa import pictures
from clipmapper.tasks.vqa.report import ExplanationReport, explanation_report
from clipmapper.tasks.vqa.samples import ExplainedSamples
from clipmapper.training.media import Media
from clipmapper.training.tables import (
    caption_perturbation_tables,
    localisation_table,
    perturbation_table,
    word_localisation_table,
)


@dataclass(frozen=True)
class ExplanationKind:
    """``report(model, samples, methods, ...)``, ``points(samples, methods)`` that its progress adds up to,
    ``scalars(report)`` worth a curve over training, ``write(report, folder, ...)`` pictures, ``media(report,
    folder)`` for loggers that show more, ``tables(numbers)``, and which picture of ``curves`` says most."""

    report: Callable[..., ExplanationReport | CaptionReport]
    points: Callable[[int, int], int]
    scalars: Callable[..., dict[str, float]]
    write: Callable[..., list[Path]]
    media: Callable[..., Media]
    tables: Callable[[Mapping], Sequence[Table]]
    curves: str


def explanation_kind(samples: ExplainedSamples | ExplainedCaptions) -> ExplanationKind:
    """The kind that belongs to these samples."""
    return CAPTIONS if isinstance(samples, ExplainedCaptions) else ANSWERS


def answer_scalars(report: ExplanationReport) -> dict[str, float]:
    """The numbers worth a curve over training, by name."""
    scalars = {}
    for row in report.perturbation.summary():
        name = f"perturbation/{row.modality}/{row.direction}/{row.method}"
        scalars[name if row.score == "accuracy" else f"{name}/probability"] = row.area.mean
    return scalars | _localisation_scalars(report)


def caption_scalars(report: CaptionReport) -> dict[str, float]:
    """The same of captions."""
    scalars = {}
    for name, scores in (("caption", report.caption_scores), ("word", report.word_scores)):
        for row in scores.summary():
            scalars[f"perturbation/{name}/{row.direction}/{row.method}/{row.score}"] = row.area.mean
    return scalars | _localisation_scalars(report)


def _localisation_scalars(report: ExplanationReport | CaptionReport) -> dict[str, float]:
    return {
        f"localisation/{name}/{score}/{method}": float(getattr(scores, score).mean())
        for method, by_name in report.localisation.items()
        for name, scores in by_name.items()
        for score in LOCALISATION_SCORES
    }


def _answer_points(samples: int, methods: int) -> int:
    return samples * methods * len(MODALITIES) * len(DIRECTIONS) * len(FRACTIONS)


def _answer_tables(numbers: Mapping) -> list[Table]:
    tables = [perturbation_table(numbers), perturbation_table(numbers, "probability")]
    return [*tables, *filter(None, [localisation_table(numbers)])]


def _caption_tables(numbers: Mapping) -> list[Table]:
    return [*caption_perturbation_tables(numbers), *filter(None, [word_localisation_table(numbers)])]


ANSWERS = ExplanationKind(
    explanation_report,
    _answer_points,
    answer_scalars,
    pictures.write_pictures,
    pictures.report_media,
    _answer_tables,
    "perturbation_accuracy.png",
)
CAPTIONS = ExplanationKind(
    caption_report,
    curve_points,
    caption_scalars,
    caption_pictures.write_pictures,
    caption_pictures.report_media,
    _caption_tables,
    "perturbation_log_probability.png",
)
