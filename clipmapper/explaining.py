"""``clipmapper.explain``: one image, one question, one picture of why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.tokens import TokenizedText, merge_words
from clipmapper.relevance import Again, Attention, AttentionTrace, Relevance, method_named, record


@dataclass(frozen=True)
class Explanation:
    """Why a model answers what it answers.

    Attributes
    ----------
    question, answer, score : the question, the explained answer and its probability (softmax over answers).
    patches : Float[rows, columns], relevance of the image patches.
    words : (word, relevance) in the order of the question; sub-word pieces are summed.
    image : UInt8[height, width, 3], the image as the model saw it.
    method : name of the explanation method.
    """

    question: str
    answer: str
    score: float
    patches: Float[np.ndarray, "rows columns"]
    words: list[tuple[str, float]]
    image: UInt8[np.ndarray, "height width 3"]
    method: str

    def plot(self, path: str | Path) -> Path:
        """Write a picture: heat map over the image, words coloured by relevance. Returns the path."""
        from clipmapper.visual.explanation import plot_explanation
        from clipmapper.visual.files import save_figure

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


def explain(
    model: CLIPmapper, image, question: str, method: str = "weighted", answer: str | None = None
) -> Explanation:
    """Explain one answer.

    ``image``: a path, PIL image or uint8 array [height, width, 3]. ``answer``: which answer to explain
    (default: the one the model gives). Raises ``UserError`` for an unknown method, an answer outside the
    vocabulary, an empty question or an unreadable image.
    """
    return explain_methods(model, image, question, [method], answer)[0]


def explain_methods(
    model: CLIPmapper, image, question: str, methods: Sequence[str], answer: str | None = None
) -> list[Explanation]:
    """Several methods on the same forward and backward."""
    functions = [method_named(name) for name in methods]
    target = None if answer is None else [model.answer_index(answer)]
    text = model.tokenize(question)
    pixels = model.load_image(image)
    traced = trace_answers(model, pixels, text, target)
    chosen = traced.explained[0]
    seen = displayed_image(model, pixels)
    score = float(traced.logits[0].softmax(dim=0)[chosen])
    explanations = []
    for name, function in zip(methods, functions, strict=True):
        relevance: Relevance = function(traced.trace)
        scores = relevance.text[0, : text.ids.shape[1]].float()
        words = merge_words(model.encoder.tokenizer, text.ids[0], text.removable[0], scores)
        patches = relevance.image[0].float().cpu().numpy()
        explanations.append(Explanation(question, model.answers[chosen], score, patches, words, seen, name))
    return explanations


def trace_answers(
    model: CLIPmapper,
    images: Float[Tensor, "batch 3 height width"],
    text: TokenizedText,
    answers: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
) -> TracedAnswers:
    """One recorded forward and one backward of the logit of each sample's answer (default: the predicted).

    The explained scalar is the pre-softmax logit (WRA). The model is left as it was.
    """
    was_training = model.training
    model.eval()
    try:
        with record(model, samples) as trace:
            logits = model(images, text, only_class_token=False)
            explained = logits.argmax(dim=1).tolist() if answers is None else list(answers)
            # Inside, because here gradients are on whatever the caller has set.
            chosen = logits[torch.arange(len(logits)), torch.tensor(explained, device=logits.device)]
        trace.backward(chosen)
    finally:
        model.train(was_training)
    trace.again = answers_again(model, images, text, explained)
    return TracedAnswers(trace, logits.detach(), explained)


def answers_again(
    model: CLIPmapper,
    images: Float[Tensor, "batch 3 height width"],
    text: TokenizedText,
    answers: Sequence[int],
) -> Again:
    """The forward that explains these answers, for the methods that make it more than once."""
    chosen = torch.tensor(answers, device=images.device)

    class Head:
        def applies(self, step: Attention) -> bool:
            return step.name.startswith("mapper")

        def __call__(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
            return model.head(pooled).gather(1, chosen[:, None])[:, 0]

    def forward(rows: Int[Tensor, "variants"]) -> Float[Tensor, "variants"]:
        logits = model(images[rows], text[rows], only_class_token=False)
        return logits.gather(1, chosen[rows][:, None])[:, 0]

    return Again(model, forward, Head())


def displayed_image(
    model: CLIPmapper, pixels: Float[Tensor, "1 3 height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Undo the encoder's normalisation: the image as the model saw it."""
    visual = model.encoder.clip.visual
    mean, std = (
        torch.tensor(v, device=pixels.device)[:, None, None] for v in (visual.image_mean, visual.image_std)
    )
    image = (pixels[0] * std + mean).clamp(0, 1) * 255
    return image.round().byte().permute(1, 2, 0).cpu().numpy()
