"""Explanations by several processes: each explains a part of the samples, and all parts are one report."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from clipmapper.evaluation.localisation import Localisation
from clipmapper.evaluation.perturbation_scores import PerturbationScores
from clipmapper.tasks.captioning.report import CaptionReport
from clipmapper.tasks.captioning.samples import ExplainedCaptions
from clipmapper.tasks.vqa.report import ExplanationReport, MethodRelevance
from clipmapper.tasks.vqa.samples import ExplainedSamples
from clipmapper.training.processes import Share

Samples = ExplainedSamples | ExplainedCaptions
Report = ExplanationReport | CaptionReport


def part_of(samples: Samples, share: Share) -> Samples | None:
    """A run of samples one behind the other; None where there are fewer samples than shares."""
    rows = slice(len(samples) * share.index // share.of, len(samples) * (share.index + 1) // share.of)
    if rows.start == rows.stop:
        return None
    values = {field.name: getattr(samples, field.name) for field in fields(samples)}
    known = {k: value for k, value in values.items() if k != "frequencies" and value is not None}
    return replace(samples, **{name: value[rows] for name, value in known.items()})


def together(samples: Samples, reports: Sequence[Report]) -> Report:
    """The report on ``samples`` from those on the parts of them, in order."""
    localisation = _localisation([report.localisation for report in reports])
    first = reports[0]
    if isinstance(first, CaptionReport):
        return CaptionReport(
            samples=samples,
            explanations={m: _joined([r.explanations[m] for r in reports]) for m in first.explanations},
            chosen=_joined([report.chosen for report in reports]),
            caption_scores=PerturbationScores.concatenate([r.caption_scores for r in reports]),
            word_scores=PerturbationScores.concatenate([r.word_scores for r in reports]),
            localisation=localisation,
        )
    return ExplanationReport(
        samples=samples,
        predictions=_joined([report.predictions for report in reports]),
        probabilities=_joined([report.probabilities for report in reports]),
        relevance={
            method: MethodRelevance(
                np.concatenate([report.relevance[method].patches for report in reports]),
                np.concatenate([report.relevance[method].tokens for report in reports]),
                _joined([report.relevance[method].words for report in reports]),
            )
            for method in first.relevance
        },
        perturbation=PerturbationScores.concatenate([report.perturbation for report in reports]),
        localisation=localisation,
    )


def _joined(parts: Sequence[Sequence]) -> list:
    return [one for part in parts for one in part]


def _localisation(
    parts: Sequence[Mapping[str, Mapping[str, Localisation]]],
) -> dict[str, dict[str, Localisation]]:
    """Kinds of words that a part does not have are missing from it."""
    return {
        method: {
            name: Localisation(
                *(
                    np.concatenate([getattr(part[method][name], score.name) for part in having])
                    for score in fields(Localisation)
                )
            )
            for name in sorted({name for part in parts for name in part[method]})
            if (having := [part for part in parts if name in part[method]])
        }
        for method in parts[0]
    }
