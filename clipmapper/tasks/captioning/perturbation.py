"""The scores of a perturbation test of a model that writes captions: of the whole caption, or of one word."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.evaluation.captions.ngram_scores import DocumentFrequencies
from clipmapper.evaluation.captions.scores import check_scores, score_captions
from clipmapper.evaluation.perturbation_scores import LOG_PROBABILITY, WORD_PROBABILITY

CAPTION_SCORES = (LOG_PROBABILITY, "bleu_4", "cider")


CaptionKept: TypeAlias = Callable[
    [Int[Tensor, "variants"], Int[Tensor, "variants kept_patches"] | None, bool],
    tuple[Float[Tensor, "variants tokens"], Sequence[str] | None],
]
"""`caption_kept(sample, image_keep, write)` → log-probabilities of the tokens of the *original* captions (0
at padding) given what is left of the image, and, if `write`, the captions that are written from it.

Arguments otherwise as of :meth:`clipmapper.evaluation.perturbation.VariantScorer.score`.
"""


class CaptionScorer:
    """A :class:`clipmapper.evaluation.perturbation.VariantScorer` of whole captions.

    "log_probability" is that of the original caption, end token included, in nats: a sum over its tokens. Any
    other score (`clipmapper.evaluation.captions.scores.SCORES`) is that of the caption written from what is
    left, against the image's references, image by image: "bleu_4" is that of single captions, whose mean is
    not the corpus BLEU-4. `frequencies` are CIDEr's document frequencies; they must come from more images
    than the chunk, or the chunk would change the score.

    Raises UserError for a score that is unknown or needs a Java that is not there.
    """

    def __init__(
        self,
        caption_kept: CaptionKept,
        references: Sequence[Sequence[str]],
        frequencies: DocumentFrequencies,
        scores: Sequence[str] = CAPTION_SCORES,
    ) -> None:
        self._written = tuple(name for name in scores if name != LOG_PROBABILITY)
        check_scores(self._written)
        self.names = tuple(scores)
        self._caption_kept, self._references, self._frequencies = caption_kept, references, frequencies
        # Many variants end in the same caption: each is scored once an image.
        self._known: dict[tuple[int, str], dict[str, float]] = {}

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        return _whole(self, len(self._references), batch_size)

    def score(
        self,
        sample: Int[np.ndarray, "variants"],
        image_keep: Int[Tensor, "variants kept_patches"] | None,
        text_keep: Tensor | None = None,
    ) -> Float[np.ndarray, "variants scores"]:
        told, texts = self._caption_kept(torch.from_numpy(sample), image_keep, bool(self._written))
        columns = {LOG_PROBABILITY: _finite(told).sum(dim=1).numpy()}
        if self._written:
            columns |= self._score_texts(sample.tolist(), texts)
        return np.stack([columns[name] for name in self.names], axis=1)

    def _score_texts(
        self, sample: Sequence[int], texts: Sequence[str]
    ) -> dict[str, Float[np.ndarray, "variants"]]:
        pairs = list(zip(sample, texts, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if new:
            found = score_captions(
                [text for _, text in new],
                [self._references[number] for number, _ in new],
                self._written,
                self._frequencies,
            ).samples
            for row, pair in enumerate(new):
                self._known[pair] = {name: float(found[name][row]) for name in self._written}
        return {name: np.array([self._known[pair][name] for pair in pairs]) for name in self._written}


class WordScorer:
    """A :class:`clipmapper.evaluation.perturbation.VariantScorer` of one word of each caption.

    "word_probability" is that of the word, given what is left of the image and the words before it.
    `words[i]`: of sample i, the places of the word's tokens among those of `caption_kept`.
    """

    names = (WORD_PROBABILITY,)

    def __init__(self, caption_kept: CaptionKept, words: Sequence[Sequence[int]]) -> None:
        self._caption_kept, self._words = caption_kept, words

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        return _whole(self, len(self._words), batch_size)

    def score(
        self,
        sample: Int[np.ndarray, "variants"],
        image_keep: Int[Tensor, "variants kept_patches"] | None,
        text_keep: Tensor | None = None,
    ) -> Float[np.ndarray, "variants scores"]:
        told = _finite(self._caption_kept(torch.from_numpy(sample), image_keep, False)[0])
        of_word = [float(told[row, self._words[number]].sum()) for row, number in enumerate(sample.tolist())]
        return np.exp(np.array(of_word))[:, None]


def _whole(
    scorer: CaptionScorer | WordScorer, samples: int, batch_size: int
) -> Float[np.ndarray, "_ scores"]:
    parts = np.split(np.arange(samples), range(batch_size, samples, batch_size))
    return np.concatenate([scorer.score(part, None) for part in parts])


def _finite(log_probabilities: Float[Tensor, "variants tokens"]) -> Float[Tensor, "variants tokens"]:
    if not log_probabilities.isfinite().all():
        raise ValueError("caption_kept must give finite log-probabilities")
    return log_probabilities.double().cpu()
