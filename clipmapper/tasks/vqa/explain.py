"""Why a model answers what it answers: one image, one question, one picture."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.text import Text
from torch import Tensor

from clipmapper.data.images import picture_of
from clipmapper.errors import UserError
from clipmapper.evaluation.perturbation import kept_indices
from clipmapper.models.tokens import TokenizedText, merge_words
from clipmapper.relevance import (
    Again,
    Attention,
    AttentionTrace,
    Needs,
    Relevance,
    method_named,
    needs_of,
    record,
)
from clipmapper.relevance.explained_scalar import ClassScalar, check_explained, require_size
from clipmapper.relevance.rerun import Removal
from clipmapper.tasks.removal import OneTokenLess
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.visual.explanation import plot_explanation
from clipmapper.visual.layout import save_figure


@dataclass(frozen=True)
class Explanation:
    """Why a model answers what it answers.

    Attributes
    ----------
    question, answer, score : the question, the explained answer and its probability (softmax over answers).
    patches : Float[rows, columns], relevance of the image patches.
    words : (word, relevance) in the order of the question; sub-word pieces are summed.
    image : UInt8[height, width, 3], what the model saw of the image, at the image's own resolution.
    method : name of the explanation method.
    called : "answer", or "explained answer" where it need not be the model's.
    """

    question: str
    answer: str
    score: float
    patches: Float[np.ndarray, "rows columns"]
    words: list[tuple[str, float]]
    image: UInt8[np.ndarray, "height width 3"]
    method: str
    called: str = "answer"

    @property
    def word_scores(self) -> list[tuple[str, float]]:
        return self.words

    @property
    def header(self) -> dict[str, str | None]:
        return {"question": self.question, "answer": self.answer}

    @property
    def names(self) -> tuple[str, ...]:
        return (self.question,)

    def lines(self) -> list[tuple[str | Text, ...]]:
        words = "  ".join(f"{word} {score:.3f}" for word, score in self.words)
        return [
            (f"question: {self.question}",),
            (f"{self.called}:", Text(self.answer, style="bold"), f"(probability {self.score:.3f})"),
            (f"relevance of words ({self.method}): {words}",),
        ]

    def plot(self, path: str | Path) -> Path:
        """Write a picture: heat map over the image, words coloured by relevance. Returns the path."""
        figure = plot_explanation(
            self.image,
            self.patches,
            self.words,
            question=self.question,
            answer=self.answer,
            score=self.score,
            method=self.method,
        )
        save_figure(figure, Path(path))
        return Path(path)


@dataclass(frozen=True)
class TracedAnswers:
    """A trace of a batch and what was explained in it."""

    trace: AttentionTrace
    logits: Float[Tensor, "batch answers"]
    explained: list[int]  # position of the explained answer, per sample


def explain_answers(
    model: CLIPmapper,
    image,
    question: str | None = None,
    methods: Sequence[str] = ("weighted",),
    answer: str | None = None,
    explained: str = "logit",
) -> list[Explanation]:
    """Explain by several methods on the same forward and backward.

    ``answer``: which to explain (default: the one that the model gives). ``explained``: its "logit", as the
    paper of weighted relevance accumulation (WRA), "probability" (softmax over answers) or
    "log_probability". Raises ``UserError`` for an answer outside the vocabulary, an empty question, another
    ``explained`` and a probability that is too small to have a gradient.
    """
    if question is None:
        raise UserError("question: no value; this model answers questions, give question=…")
    functions = [method_named(name) for name in methods]
    target = None if answer is None else [model.answer_index(answer)]
    text = model.tokenize(question)
    pixels = model.load_image(image)
    traced = trace_answers(model, pixels, text, target, needs=needs_of(functions), explained=explained)
    chosen = traced.explained[0]
    seen = picture_of(image, pixels, model.encoder.clip.visual)
    score = float(traced.logits[0].softmax(dim=0)[chosen])
    called = "answer" if answer is None else "explained answer"
    explanations = []
    for name, function in zip(methods, functions, strict=True):
        relevance: Relevance = function(traced.trace)
        scores = relevance.text[0, : text.ids.shape[1]].float()
        words = merge_words(model.encoder.tokenizer, text.ids[0], text.removable[0], scores)
        patches = relevance.image[0].float().cpu().numpy()
        explanations.append(
            Explanation(question, model.answers[chosen], score, patches, words, seen, name, called)
        )
    return explanations


def trace_answers(
    model: CLIPmapper,
    images: Float[Tensor, "batch 3 height width"],
    text: TokenizedText,
    answers: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    needs: Needs | None = None,
    explained: str = "logit",
) -> TracedAnswers:
    """One recorded forward and one backward of each sample's answer (default: the predicted).

    ``explained``: the answer's "logit" (WRA), "probability" or "log_probability". ``needs``: of the methods
    that are to read the trace. The model is left as it was. Raises ``UserError`` as :func:`explain_answers`.
    """
    check_explained(explained)
    needs = Needs() if needs is None else needs
    with model.evaluating(), record(model, samples, needs.rules) as trace:
        logits = model(images, text, only_class_token=False)
    places = logits.argmax(dim=1).tolist() if answers is None else list(answers)
    scalar = ClassScalar(torch.tensor(places, device=logits.device), explained)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
        y, times = scalar.differentiated(logits, torch.arange(len(places), device=logits.device))
    require_size(times, [model.answers[place] for place in places])
    needs.differentiate(trace, y, times)
    trace.again = answers_again(model, images, text, scalar, _OneTokenLess(model, images, text, trace))
    return TracedAnswers(trace, logits.detach(), places)


def answers_again(
    model: CLIPmapper,
    images: Float[Tensor, "batch 3 height width"],
    text: TokenizedText,
    scalar: ClassScalar,
    removal: Removal | None = None,
) -> Again:
    """The forward that explains these answers, for the methods that make it more than once."""

    class Head:
        def applies(self, step: Attention) -> bool:
            return step.name.startswith("mapper")

        def __call__(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
            return scalar.value(model.head(pooled), torch.arange(len(pooled), device=pooled.device))

    def forward(rows: Int[Tensor, "variants"]) -> Float[Tensor, "variants answers"]:
        return model(images[rows], text[rows], only_class_token=False)

    return Again(model, forward, Head(), scalar, removal)


class _OneTokenLess(OneTokenLess):
    """Answers without one patch of an image or one token of a question: physically removed."""

    def __init__(
        self,
        model: CLIPmapper,
        images: Float[Tensor, "batch 3 height width"],
        text: TokenizedText,
        trace: AttentionTrace,
    ) -> None:
        self.model, self.images, self.text = model, images, text
        # (A tower that reads its padding has it as tokens of its stream.)
        words = torch.zeros_like(trace.padding_free(trace.text_stream))
        words[:, : text.removable.shape[1]] = text.removable
        super().__init__(trace, model.encoder, words)

    def without_patch(
        self, rows: Int[Tensor, "variants"], keep: Int[Tensor, "variants kept"]
    ) -> Float[Tensor, "variants answers"]:
        return self._scorer(rows, keep, None)

    def without_word(
        self, rows: Int[Tensor, "variants"], tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants answers"]:
        valid = self.text.valid[rows]
        stay = valid & (torch.arange(valid.shape[1], device=valid.device) != tokens[:, None])
        return self._scorer(rows, None, kept_indices(stay.cpu().numpy()))

    @functools.cached_property
    def _scorer(self) -> Callable:
        return self.model.kept_scorer(self.images, self.text)
