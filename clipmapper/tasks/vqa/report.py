"""Score explanation methods on questions: relevance, perturbation and localisation in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.table import Table

from clipmapper.evaluation.explanation_scores.chosen import (
    REMOVAL,
    Scored,
    as_scored,
    score_kind,
    score_samples,
)
from clipmapper.evaluation.explanation_scores.judged import judge
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.explanation_scores.with_planted import WithPlanted
from clipmapper.evaluation.localisation import Localisation, image_localisation, word_localisation
from clipmapper.evaluation.perturbation import ModalityRelevance, run_in_chunks
from clipmapper.evaluation.perturbation_scores import MODALITIES, PerturbationScores, perturbation_numbers
from clipmapper.models.tokens import word_positions
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.pictures import (
    comparison_figure,
    explanation_figure,
    localisation_table,
    perturbation_table,
)
from clipmapper.tasks.vqa.planted import deciding_of, require_truth
from clipmapper.tasks.vqa.samples import QuestionSamples
from clipmapper.tasks.vqa.subject import AnswerSubject, answer_maps
from clipmapper.training.explained import Report, joined, joined_localisation, joined_scored
from clipmapper.training.shown import Cell, Html, Picture, score_tables
from clipmapper.visual.heatmap import words_html
from clipmapper.visual.layout import readable_part

_NAME = 120  # bytes of a file's name that are a family's


@dataclass(frozen=True)
class MethodRelevance:
    """Relevance by one method of all samples: patches Float[samples, rows, columns], and per-word scores."""

    patches: Float[np.ndarray, "samples rows columns"]
    tokens: Float[np.ndarray, "samples tokens"]
    words: Sequence[Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class AnswerReport(Report):
    """On answers. ``localisation``: method → "image" | "text", of the questions of which that is known.
    ``accuracies``: of the predictions, soft."""

    samples: QuestionSamples
    predictions: Sequence[str]
    probabilities: Sequence[float]
    accuracies: Sequence[float]
    relevance: Mapping[str, MethodRelevance]
    scored: Mapping[str, Scored]
    localisation: Mapping[str, Mapping[str, Localisation]]

    curves = "perturbation_accuracy.png"

    columns = ("image", "heat map", "question", "family", "answer", "truth", "probability")
    sampled_score = "probability"

    @property
    def tests(self) -> dict[str, dict[str, PerturbationScores]]:
        questions = f"{len(self.samples)} questions"
        return {
            score: {questions: found.curves}
            for score, found in self.scored.items()
            if found.curves is not None
        }

    @property
    def perturbation(self) -> PerturbationScores:
        """The curves where tokens are removed, if that is one of the scores."""
        return self.scored[REMOVAL].curves

    def perturbation_numbers(self, confidence: float, seed: int) -> dict:
        if REMOVAL not in self.scored:
            return {}
        return perturbation_numbers(self.perturbation, confidence, seed)

    def judged(self, confidence: float, seed: int) -> dict[str, dict]:
        """What the scores are worth (:func:`~clipmapper.evaluation.explanation_scores.judged.judge`), under
        "answer". Raises ``UserError`` where it is not known of every question what decides it."""
        require_truth(self.samples)
        values = {score: found.values for score, found in self.scored.items()}
        truth = {
            modality: {
                name: np.stack([getattr(its[modality], name) for its in self.localisation.values()])
                for name in ("mass", "rank")
            }
            for modality in MODALITIES
        }
        scores = judge(values, truth, confidence=confidence, seed=seed)
        return {"answer": {"samples": len(self.samples), "scores": scores}}

    def groups(self) -> dict[str, list[str]]:
        """By whether the answer is right (a soft accuracy of one half, at least), and by family."""
        right = ["right" if accuracy >= 0.5 else "wrong" for accuracy in self.accuracies]
        return {"answer": right, "family": list(self.samples.families)}

    def located(self) -> dict[str, list[int]]:
        known = {"image": self.samples.masks, "text": self.samples.deciding}
        return {name: [i for i, one in enumerate(rows) if one is not None] for name, rows in known.items()}

    def scalars(self) -> dict[str, float]:
        scalars = {}
        for row in self.perturbation.summary() if REMOVAL in self.scored else ():
            name = f"perturbation/{row.modality}/{row.direction}/{row.method}"
            scalars[name if row.score == "accuracy" else f"{name}/probability"] = row.area.mean
        return scalars | self.score_scalars() | self.localisation_scalars()

    @staticmethod
    def tables(numbers: Mapping) -> list[Table]:
        scores = ("accuracy", "probability") if numbers["perturbation"] else ()
        tables = [perturbation_table(numbers, score) for score in scores]
        return [*tables, *score_tables(numbers), *filter(None, [localisation_table(numbers)])]

    def explanation(self, number: int) -> tuple[str, Figure]:
        # A family is any text that the data have, such as VQA v2's "yes/no".
        return readable_part(self.samples.families[number], _NAME, "_"), explanation_figure(self, number)

    def comparison(self, number: int) -> Figure:
        return comparison_figure(self, number)

    def cells(self, number: int, picture: Path) -> Sequence[Cell]:
        samples, method = self.samples, next(iter(self.relevance))
        return (
            Picture(samples.pictures[number]),
            Picture(picture),
            Html(words_html(self.relevance[method].words[number])),
            samples.families[number],
            self.predictions[number],
            samples.truths[number],
            self.probabilities[number],
        )

    @classmethod
    def together(cls, samples: QuestionSamples, reports: Sequence["AnswerReport"]) -> "AnswerReport":
        return cls(
            samples=samples,
            predictions=joined([report.predictions for report in reports]),
            probabilities=joined([report.probabilities for report in reports]),
            accuracies=joined([report.accuracies for report in reports]),
            relevance={
                method: MethodRelevance(
                    np.concatenate([report.relevance[method].patches for report in reports]),
                    np.concatenate([report.relevance[method].tokens for report in reports]),
                    joined([report.relevance[method].words for report in reports]),
                )
                for method in reports[0].relevance
            },
            scored={
                score: joined_scored([report.scored[score] for report in reports])
                for score in reports[0].scored
            },
            localisation=joined_localisation(reports),
        )


def answer_report(
    model: CLIPmapper,
    samples: QuestionSamples,
    methods: Sequence[str],
    *,
    chunk: int,
    batch_size: int,
    seed: int,
    scores: Sequence[str] = (REMOVAL,),
    planted: bool = False,
    explained: str = "logit",
    folder: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> AnswerReport:
    """See :meth:`clipmapper.training.task.Task.report`. ``explained``: as of
    :func:`~clipmapper.tasks.vqa.explain.trace_answers`."""
    rows, columns = model.encoder.grid
    deciding = deciding_of(model, samples) if planted else None
    with model.evaluating():
        traced = []
        for start in range(0, len(samples), chunk):
            places = torch.arange(start, min(start + chunk, len(samples)))
            traced.append(
                answer_maps(
                    model, samples, places, samples.images[places], methods, seed=seed, explained=explained
                )
            )
            if progress is not None:
                progress(0)  # no point of a curve yet, but whoever wants to stop can
        patches, tokens = (
            {m: np.concatenate([getattr(part[m], name).numpy() for part, _ in traced]) for m in methods}
            for name in ("image", "text")
        )
        logits = torch.cat([part for _, part in traced])
        given = logits.argmax(dim=1)

        def compute(positions: range, score: str) -> PerturbationScores | ScoreValues:
            part = slice(positions.start, positions.stop)
            subject = AnswerSubject(
                model, samples, positions, methods, answers=given[part], seed=seed, explained=explained
            )
            relevance = {
                method: ModalityRelevance(
                    torch.from_numpy(patches[method][part]), torch.from_numpy(tokens[method][part])
                )
                for method in methods
            }
            if deciding is not None:
                subject = WithPlanted(subject, deciding.part(positions), seed)
                relevance |= subject.planted()
            return score_samples(
                score, subject, relevance, batch_size=batch_size, seed=seed, progress=progress
            )

        scored = {
            score: as_scored(
                run_in_chunks(
                    len(samples),
                    chunk,
                    partial(compute, score=score),
                    folder=None if folder is None else folder / score,
                    key=f"{key}, planted" if planted else key,
                    kind=score_kind(score),
                )
            )
            for score in scores
        }
    words = _words(model, samples)
    relevance = {
        m: MethodRelevance(patches[m].reshape(-1, rows, columns), tokens[m], _word_scores(words, tokens[m]))
        for m in methods
    }
    probability = logits.softmax(dim=1).gather(1, given[:, None])[:, 0]
    return AnswerReport(
        samples=samples,
        predictions=[model.answers[i] for i in given.tolist()],
        probabilities=probability.tolist(),
        accuracies=samples.targets.cpu().gather(1, given.cpu()[:, None])[:, 0].tolist(),
        relevance=relevance,
        scored=scored,
        localisation={m: _localise(samples, r) for m, r in relevance.items()},
    )


def _words(model: CLIPmapper, samples: QuestionSamples) -> list[list[tuple[str, list[int]]]]:
    text, tokenizer = samples.text, model.encoder.tokenizer
    return [word_positions(tokenizer, text.ids[i], text.removable[i]) for i in range(len(samples))]


def _word_scores(
    words: Sequence[Sequence[tuple[str, list[int]]]], tokens: Float[np.ndarray, "samples tokens"]
) -> list[list[tuple[str, float]]]:
    return [
        [(word, float(sum(tokens[row, p] for p in positions))) for word, positions in of_sample]
        for row, of_sample in enumerate(words)
    ]


def _localise(samples: QuestionSamples, relevance: MethodRelevance) -> dict[str, Localisation]:
    found = {}
    seen = [row for row, mask in enumerate(samples.masks) if mask is not None]
    if seen:
        masks = [samples.masks[row] for row in seen]
        found["image"] = image_localisation(relevance.patches[seen].astype(np.float64), masks)
    known = [row for row, words in enumerate(samples.deciding) if words is not None]
    if known:
        longest = max(len(relevance.words[row]) for row in known)
        scores = np.zeros((len(known), longest))
        deciding, valid = (np.zeros((len(known), longest), dtype=bool) for _ in range(2))
        for place, row in enumerate(known):
            words = relevance.words[row]
            scores[place, : len(words)] = [score for _, score in words]
            deciding[place, : len(words)] = samples.deciding[row]
            valid[place, : len(words)] = True
        found["text"] = word_localisation(scores, deciding, valid)
    return found
