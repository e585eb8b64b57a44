"""Score explanation methods on questions: relevance, perturbation and localisation in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from clipmapper.evaluation.localisation import Localisation, image_localisation, word_localisation
from clipmapper.evaluation.perturbation import ModalityRelevance, perturb, run_in_chunks
from clipmapper.evaluation.perturbation_scores import PerturbationScores, perturbation_numbers
from clipmapper.models.tokens import word_positions
from clipmapper.relevance import method_named, needs_of
from clipmapper.tasks.vqa.explain import trace_answers
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.pictures import (
    comparison_figure,
    explanation_figure,
    localisation_table,
    perturbation_table,
)
from clipmapper.tasks.vqa.samples import QuestionSamples
from clipmapper.training.explained import Report, joined, joined_localisation
from clipmapper.training.shown import Cell, Html, Picture
from clipmapper.visual.heatmap import words_html
from clipmapper.visual.layout import readable_part

_NAME = 120  # bytes of a file's name that are a family's

ScoreKept: TypeAlias = Callable[
    [
        Int[Tensor, "variants"],
        Int[Tensor, "variants kept_patches"] | None,
        Int[Tensor, "variants kept_tokens"] | None,
    ],
    Float[Tensor, "variants answers"],
]
"""`score_kept(sample, image_keep, text_keep)` → logits. `sample` are positions in the current chunk.

`image_keep` holds the patches kept (0 … P−1, ascending; the class token is always kept and not listed),
`text_keep` the text tokens kept *including* start and end tokens, ascending, filled up with −1 at the end.
None means that nothing of that modality is removed. The indices are on the CPU; the logits may be anywhere.
"""


class AnswerScorer:
    """A :class:`clipmapper.evaluation.perturbation.VariantScorer` of answers.

    "accuracy" is the soft accuracy of the answer given after removal, `targets[i, a]` for answer a of sample
    i; "probability" the softmax over answers of the answer that the *unperturbed* model gave.
    """

    names = ("accuracy", "probability")

    def __init__(self, score_kept: ScoreKept, targets: Float[Tensor, "samples answers"]) -> None:
        self.score_kept = score_kept
        self.targets = targets
        self.original = torch.empty(len(targets), dtype=torch.int64)  # what the unperturbed model answers

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        """Scores of the untouched samples; notes their answers, which `score` then explains."""
        scores = []
        for sample in np.split(
            np.arange(len(self.targets)), range(batch_size, len(self.targets), batch_size)
        ):
            logits = self._logits(sample, None, None)
            self.original[sample] = logits.argmax(dim=1).cpu()
            scores.append(self._score(sample, logits))
        return np.concatenate(scores)

    def score(
        self, sample: Int[np.ndarray, "variants"], image_keep: Tensor | None, text_keep: Tensor | None
    ) -> Float[np.ndarray, "variants scores"]:
        return self._score(sample, self._logits(sample, image_keep, text_keep))

    def _logits(
        self, sample: Int[np.ndarray, "variants"], image_keep: Tensor | None, text_keep: Tensor | None
    ) -> Float[Tensor, "variants answers"]:
        logits = self.score_kept(torch.from_numpy(sample), image_keep, text_keep)
        if logits.shape != (len(sample), self.targets.shape[1]) or not logits.isfinite().all():
            raise ValueError(f"score_kept must give finite logits [variants, answers]: {tuple(logits.shape)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # no softmax in half precision

    def _score(
        self, sample: Int[np.ndarray, "variants"], logits: Float[Tensor, "variants answers"]
    ) -> Float[np.ndarray, "variants scores"]:
        accuracy = self.targets[torch.from_numpy(sample), logits.argmax(dim=1).cpu()]
        explained = self.original[sample].to(logits.device)
        probability = logits.softmax(dim=1).gather(1, explained[:, None])[:, 0].cpu()
        return np.stack([accuracy.double().numpy(), probability.double().numpy()], axis=1)


@dataclass(frozen=True)
class MethodRelevance:
    """Relevance by one method of all samples: patches Float[samples, rows, columns], and per-word scores."""

    patches: Float[np.ndarray, "samples rows columns"]
    tokens: Float[np.ndarray, "samples tokens"]
    words: Sequence[Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class AnswerReport(Report):
    """On answers. ``localisation``: method → "image" | "text", of the questions of which that is known."""

    samples: QuestionSamples
    predictions: Sequence[str]
    probabilities: Sequence[float]
    relevance: Mapping[str, MethodRelevance]
    perturbation: PerturbationScores
    localisation: Mapping[str, Mapping[str, Localisation]]

    curves = "perturbation_accuracy.png"

    columns = ("image", "heat map", "question", "family", "answer", "truth", "probability")
    sampled_score = "probability"

    @property
    def tests(self) -> dict[str, PerturbationScores]:
        return {f"{len(self.samples)} questions": self.perturbation}

    def perturbation_numbers(self, confidence: float, seed: int) -> dict:
        return perturbation_numbers(self.perturbation, confidence, seed)

    def scalars(self) -> dict[str, float]:
        scalars = {}
        for row in self.perturbation.summary():
            name = f"perturbation/{row.modality}/{row.direction}/{row.method}"
            scalars[name if row.score == "accuracy" else f"{name}/probability"] = row.area.mean
        return scalars | self.localisation_scalars()

    @staticmethod
    def tables(numbers: Mapping) -> list[Table]:
        tables = [perturbation_table(numbers), perturbation_table(numbers, "probability")]
        return [*tables, *filter(None, [localisation_table(numbers)])]

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
            relevance={
                method: MethodRelevance(
                    np.concatenate([report.relevance[method].patches for report in reports]),
                    np.concatenate([report.relevance[method].tokens for report in reports]),
                    joined([report.relevance[method].words for report in reports]),
                )
                for method in reports[0].relevance
            },
            perturbation=PerturbationScores.concatenate([report.perturbation for report in reports]),
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
    explained: str = "logit",
    folder: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> AnswerReport:
    """See :meth:`clipmapper.training.task.Task.report`. ``explained``: as of
    :func:`~clipmapper.tasks.vqa.explain.trace_answers`."""
    with model.evaluating():
        traced = []
        for start in range(0, len(samples), chunk):
            positions = range(start, min(start + chunk, len(samples)))
            traced.append(_relevance(model, samples, positions, methods, seed, explained))
            if progress is not None:
                progress(0)  # no point of a curve yet, but whoever wants to stop can
        patches, tokens = (
            {m: np.concatenate([part[k][m] for part in traced]) for m in methods} for k in (0, 1)
        )
        logits = torch.cat([part[2] for part in traced])

        def compute(positions: range) -> PerturbationScores:
            index = torch.tensor(list(positions))
            text = samples.text[index]
            relevance = {
                method: ModalityRelevance(
                    torch.from_numpy(patches[method][positions.start : positions.stop]).flatten(1),
                    torch.from_numpy(tokens[method][positions.start : positions.stop]),
                )
                for method in methods
            }
            return perturb(
                AnswerScorer(model.kept_scorer(samples.images[index], text), samples.targets[index]),
                relevance,
                text.removable,
                text.valid,
                sample_ids=np.array([samples.ids[i] for i in positions]),
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )

        scores = run_in_chunks(len(samples), chunk, compute, folder=folder, key=key)
    words = _words(model, samples)
    relevance = {m: MethodRelevance(patches[m], tokens[m], _word_scores(words, tokens[m])) for m in methods}
    given = logits.argmax(dim=1)
    probability = logits.softmax(dim=1).gather(1, given[:, None])[:, 0]
    return AnswerReport(
        samples=samples,
        predictions=[model.answers[i] for i in given.tolist()],
        probabilities=probability.tolist(),
        relevance=relevance,
        perturbation=scores,
        localisation={m: _localise(samples, r) for m, r in relevance.items()},
    )


def _relevance(
    model: CLIPmapper,
    samples: QuestionSamples,
    positions: range,
    methods: Sequence[str],
    seed: int,
    explained: str,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], torch.Tensor]:
    index = torch.tensor(list(positions))
    traced = trace_answers(
        model,
        samples.images[index].to(model.device),
        samples.text[index].to(model.device),
        samples=[samples.ids[i] for i in positions],
        needs=needs_of(map(method_named, methods)),
        explained=explained,
    )
    patches, tokens = {}, {}
    for name in methods:
        method = method_named(name)
        found = method(traced.trace, seed=seed) if name == "random" else method(traced.trace)
        patches[name] = found.image.float().cpu().numpy()
        # A text tower that reads its padding was given more of it: the words come first.
        tokens[name] = found.text[:, : samples.text.ids.shape[1]].float().cpu().numpy()
    return patches, tokens, traced.logits.float().cpu()


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
