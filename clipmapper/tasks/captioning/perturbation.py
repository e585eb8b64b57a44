"""The scores of a perturbation test of captions: of images with some patches removed, by caption or word."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from clipmapper.evaluation.captions.ngram_scores import DocumentFrequencies
from clipmapper.evaluation.captions.scores import check_scores, score_captions
from clipmapper.evaluation.perturbation_scores import LOG_PROBABILITY, MEAN_PROBABILITY, WORD_PROBABILITY
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.replaced import Replacing

CAPTION_SCORES = (LOG_PROBABILITY, MEAN_PROBABILITY, "bleu_4", "cider")
# Of the original caption, by the model; other scores are of the caption that is written.
TOLD = (LOG_PROBABILITY, MEAN_PROBABILITY)


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

    "log_probability" is that of the original caption, end token included, in nats: a sum over its tokens.
    "mean_probability" is the geometric mean of its tokens' probabilities: between 0 and 1, so that being sure
    of the wrong thing is not rewarded without end. Any other score
    (`clipmapper.evaluation.captions.scores.SCORES`) is that of the caption written from what is left, against
    the image's references, image by image: "bleu_4" is that of single captions, whose mean is not the corpus
    BLEU-4. `frequencies` are CIDEr's document frequencies; they must come from more images than the chunk, or
    the chunk would change the score. `tokens`: how many tokens each caption has, the end counted.

    Raises UserError for a score that is unknown or needs a Java that is not there.
    """

    def __init__(
        self,
        caption_kept: CaptionKept,
        references: Sequence[Sequence[str]],
        frequencies: DocumentFrequencies,
        tokens: Int[np.ndarray, "samples"],
        scores: Sequence[str] = CAPTION_SCORES,
    ) -> None:
        self._written = tuple(name for name in scores if name not in TOLD)
        check_scores(self._written)
        self.names = tuple(scores)
        self._caption_kept, self._references, self._frequencies = caption_kept, references, frequencies
        self._tokens = tokens
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
        told = _finite(told)
        total = told.sum(dim=1).numpy()
        columns = {LOG_PROBABILITY: total, MEAN_PROBABILITY: np.exp(total / self._tokens[sample])}
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


# Scores of words held at a time: of 512 captions of 30 tokens, 49408 a token are 3 GB.
_MOST_SCORES = 2**26


ImageKept: TypeAlias = Callable[
    [Int[Tensor, "variants"], Int[Tensor, "variants kept"] | None],
    tuple[Float[Tensor, "variants image width"], Int[Tensor, "variants kept"] | None],
]
"""`image_kept(sample, image_keep)` → the encoder's tokens of variants of images, and which patches are there
(None: all)."""


@torch.no_grad()
def images_removed(model: Captioner, images: Num[Tensor, "samples 3 height width"]) -> ImageKept:
    """Images some of whose patches are removed, behind patches that are embedded once."""
    tower = model.encoder.image_tower
    embedded, rotary = tower.embed(images.to(model.device))
    return lambda sample, keep: (tower.behind(embedded[sample], rotary, keep=keep), keep)


@torch.no_grad()
def images_replaced(others: Replacing) -> ImageKept:
    """Images some of whose patches are replaced."""
    whole = others.encoder.image_tokens(others.images)
    return lambda sample, keep: (whole[sample] if keep is None else others.image_tokens(sample, keep), None)


@torch.no_grad()
def kept_captions(
    model: Captioner, image_kept: ImageKept, text: TokenizedText, decoding: Decoding
) -> CaptionKept:
    """A function that captions these images with some of their patches removed, or replaced.

    ``function(sample, image_keep, write)`` → the log-probability of every token of the given captions but the
    first, 0 at padding, and, where ``write``, the captions that the model writes from what is left.
    ``sample`` are positions in this batch, ``image_keep`` the patches that stay (None: all). The text tower,
    which does not read the image, runs once; a variant's image tower runs once for both.
    """
    text = text.to(model.device)
    text_tokens = model.text_tokens(text.ids, text.valid)

    @torch.no_grad()
    def function(
        sample: Int[Tensor, "variants"], image_keep: Int[Tensor, "variants kept"] | None, write: bool
    ) -> tuple[Float[Tensor, "variants told"], Sequence[str] | None]:
        sample = sample.to(model.device)
        image_tokens, keep = image_kept(sample, None if image_keep is None else image_keep.to(model.device))
        told = log_probabilities(model, image_tokens, text_tokens[sample], text[sample], keep)
        if not write:
            return told, None
        written = write_captions(model, image_tokens, decoding, keep=keep)
        return told, [texts[0] for texts in written.texts]

    return function


def log_probabilities(
    model: Captioner,
    image_tokens: Float[Tensor, "variants image image_width"],
    text_tokens: Float[Tensor, "variants tokens text_width"],
    text: TokenizedText,
    keep: Int[Tensor, "variants kept"] | None,
) -> Float[Tensor, "variants told"]:
    """Log-probability of every token but the first, given those before it; 0 at padding."""
    wanted = text.valid[:, 1:]
    place = model.head.places(text.ids[:, 1:], wanted)
    rows = max(1, _MOST_SCORES // (text.ids.shape[1] * model.head.known))
    told = []
    for start in range(0, len(place), rows):
        part = slice(start, start + rows)
        logits = model.caption_logits(
            image_tokens[part],
            text_tokens[part],
            text.valid[part],
            keep=None if keep is None else keep[part],
            known_only=True,
        )[:, :-1].float()
        chosen = logits.gather(2, place[part, :, None])[..., 0]
        # Not log_softmax, which would be a second tensor of that size: one token of each is asked for.
        told.append((chosen - logits.logsumexp(dim=2)).masked_fill(~wanted[part], 0.0))
    return torch.cat(told)
