"""``clipmapper.explain``: one image, one question (or caption), one picture of why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipmapper.data.images import picture_of
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.cider import DocumentFrequencies
from clipmapper.models.tokens import TokenizedText, merge_words
from clipmapper.relevance import Again, Attention, AttentionTrace, Relevance, method_named, record
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import CaptionExplanation, explain_caption_methods
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.vqa.model import CLIPmapper


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
    model: CLIPmapper | Captioner,
    image,
    question: str | None = None,
    method: str = "weighted",
    answer: str | None = None,
    *,
    caption: str | None = None,
    word: str | int | None = None,
    word_weights: str = "mean",
    scalar: str = "logit",
    decoding: Decoding | None = None,
    references: Sequence[str] | None = None,
    frequencies: DocumentFrequencies | None = None,
) -> Explanation | CaptionExplanation:
    """Explain one answer, or, of a captioner, every word of a caption.

    ``image``: a path, PIL image or uint8 array [height, width, 3]. ``method``: a name in
    ``clipmapper.relevance.METHODS``.

    Of a model that answers questions: ``question``, and ``answer``, which answer to explain (default: the
    one the model gives). Raises ``UserError`` for an answer outside the vocabulary or an empty question.

    Of a captioner: ``caption`` to explain (default: the one that the model writes, as ``decoding`` says) and
    ``word``, one word of it alone, by name or by place (default: all). ``word_weights``: how the maps of
    words are averaged into one of the caption: "mean" (stop-words count 0), "cider" (by the CIDEr that is
    lost without the word; needs ``references`` and ``frequencies``) or "clip" (by the CLIPScore that is
    lost). ``scalar``: explain each word's "logit" or "log_probability". Raises ``UserError`` for an empty
    caption, words that the model cannot say, a ``word`` that the caption does not have or has several times.

    Either raises ``UserError`` for an unknown method, an unreadable image, and what belongs to the other.
    """
    if isinstance(model, Captioner):
        if question is not None or answer is not None:
            raise UserError(
                "this model writes captions: it takes caption=... and word=..., no question or answer"
            )
        return explain_caption_methods(
            model, image, [method], caption=caption, word=word, word_weights=word_weights, scalar=scalar,
            decoding=decoding, references=references, frequencies=frequencies,
        )[0]  # fmt: skip
    if not (caption is word is decoding is references is frequencies is None):
        raise UserError("this model answers questions: it takes question=... and answer=..., no caption")
    if question is None:
        raise UserError("this model answers questions: give question='what colour is the ring?'")
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
    seen = picture_of(image, pixels, model.encoder.clip.visual)
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
