"""Score explanation methods on a set of samples: relevance, perturbation and localisation in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from clipmapper.evaluation.answer_perturbation import AnswerScorer
from clipmapper.evaluation.localisation import Localisation, image_localisation, word_localisation
from clipmapper.evaluation.perturbation import ModalityRelevance, perturb
from clipmapper.evaluation.perturbation_run import run_in_chunks
from clipmapper.evaluation.perturbation_scores import PerturbationScores
from clipmapper.explaining import trace_answers
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.tokens import word_positions
from clipmapper.relevance import method_named
from clipmapper.training.explained_samples import ExplainedSamples
from clipmapper.training.explanation_numbers import localisation_numbers, perturbation_numbers


@dataclass(frozen=True)
class MethodRelevance:
    """Of one method, for all samples: patches Float[samples, rows, columns], and per-word scores."""

    patches: Float[np.ndarray, "samples rows columns"]
    tokens: Float[np.ndarray, "samples tokens"]
    words: Sequence[Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class ExplanationReport:
    """Everything that is known about the methods on some samples."""

    samples: ExplainedSamples
    predictions: Sequence[str]
    probabilities: Sequence[float]
    relevance: Mapping[str, MethodRelevance]
    perturbation: PerturbationScores
    localisation: Mapping[str, Mapping[str, Localisation]]  # method → "image" | "text"

    def numbers(self, confidence: float, seed: int) -> dict:
        """All results by name, for ``results.json``: areas, paired differences, localisation."""
        return {
            "samples": len(self.samples),
            "confidence": confidence,
            "perturbation": perturbation_numbers(self.perturbation, confidence, seed),
            "localisation": localisation_numbers(self.localisation, confidence, seed),
        }


def explanation_report(
    model: CLIPmapper,
    samples: ExplainedSamples,
    methods: Sequence[str],
    *,
    chunk: int,
    batch_size: int,
    seed: int,
    folder: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> ExplanationReport:
    """Explain every sample by every method, remove tokens in that order, compare with the truth.

    ``chunk`` samples are traced together; ``batch_size`` is the most perturbed variants in one forward.
    With ``folder`` finished chunks are kept there and taken up again when ``key`` is the same.
    """
    was_training = model.training
    model.eval()
    try:
        traced = []
        for start in range(0, len(samples), chunk):
            positions = range(start, min(start + chunk, len(samples)))
            traced.append(_relevance(model, samples, positions, methods, seed))
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
    finally:
        model.train(was_training)
    words = _words(model, samples)
    relevance = {m: MethodRelevance(patches[m], tokens[m], _word_scores(words, tokens[m])) for m in methods}
    explained = logits.argmax(dim=1)
    probability = logits.softmax(dim=1).gather(1, explained[:, None])[:, 0]
    return ExplanationReport(
        samples=samples,
        predictions=[model.answers[i] for i in explained.tolist()],
        probabilities=probability.tolist(),
        relevance=relevance,
        perturbation=scores,
        localisation={m: _localise(samples, r) for m, r in relevance.items()},
    )


def _relevance(
    model: CLIPmapper, samples: ExplainedSamples, positions: range, methods: Sequence[str], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], torch.Tensor]:
    index = torch.tensor(list(positions))
    traced = trace_answers(
        model,
        samples.images[index].to(model.device),
        samples.text[index].to(model.device),
        samples=[samples.ids[i] for i in positions],
    )
    patches, tokens = {}, {}
    for name in methods:
        method = method_named(name)
        found = method(traced.trace, seed=seed) if name == "random" else method(traced.trace)
        patches[name] = found.image.float().cpu().numpy()
        # A text tower that reads its padding was given more of it: the words come first.
        tokens[name] = found.text[:, : samples.text.ids.shape[1]].float().cpu().numpy()
    return patches, tokens, traced.logits.float().cpu()


def _words(model: CLIPmapper, samples: ExplainedSamples) -> list[list[tuple[str, list[int]]]]:
    text, tokenizer = samples.text, model.encoder.tokenizer
    return [word_positions(tokenizer, text.ids[i], text.removable[i]) for i in range(len(samples))]


def _word_scores(
    words: Sequence[Sequence[tuple[str, list[int]]]], tokens: Float[np.ndarray, "samples tokens"]
) -> list[list[tuple[str, float]]]:
    return [
        [(word, float(sum(tokens[row, p] for p in positions))) for word, positions in of_sample]
        for row, of_sample in enumerate(words)
    ]


def _localise(samples: ExplainedSamples, relevance: MethodRelevance) -> dict[str, Localisation]:
    found = {}
    if samples.masks is not None:
        found["image"] = image_localisation(relevance.patches.astype(np.float64), samples.masks)
    if samples.deciding is not None:
        longest = max(len(words) for words in relevance.words)
        scores = np.zeros((len(samples), longest))
        deciding, valid = (np.zeros((len(samples), longest), dtype=bool) for _ in range(2))
        for row, (words, truth) in enumerate(zip(relevance.words, samples.deciding, strict=True)):
            scores[row, : len(words)] = [score for _, score in words]
            deciding[row, : len(words)] = truth
            valid[row, : len(words)] = True
        found["text"] = word_localisation(scores, deciding, valid)
    return found
