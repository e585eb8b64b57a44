"""BLEU, ROUGE-L and CIDEr-D as coco-caption computes them (Chen et al. 2015, arXiv 1504.00325).

A caption is a sequence of words; :func:`clipmapper.evaluation.captions.ptb_tokenizer.ptb_tokenise` makes them
as the published scores have them. Every score is one number a sample; BLEU of a corpus comes from summed
counts.

CIDEr-D is of Vedantam et al. 2015 (arXiv 1411.5726, equations 1 to 4), and what papers on captioning call
CIDEr: clipped counts, a penalty on the difference in length, times ten. It is also the reward of
self-critical training.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int64, Num

ORDER = 4
Words = Sequence[str]

# coco-caption's guards against dividing by zero. They are in the published digits.
_TINY, _SMALL = 1e-15, 1e-9


@lru_cache(maxsize=1 << 14)
def ngram_counts(words: tuple[str, ...]) -> tuple[Counter[tuple[str, ...]], int]:
    """How often each 1- to 4-gram occurs in a caption, and the caption's number of words.

    The tokenizer writes a mixed number as one word with a no-break space ("22 3/4"). coco-caption splits
    there for BLEU and CIDEr, and does not for ROUGE-L; so does this module.

    The result is kept, because references are scored against again and again: do not change it.
    """
    words = tuple(" ".join(words).split())
    counts = Counter(
        words[start : start + order]
        for order in range(1, ORDER + 1)
        for start in range(len(words) - order + 1)
    )
    return counts, len(words)


def bleu_counts(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Int64[np.ndarray, "samples 10"]:
    """Count for BLEU: lengths of prediction and reference, n-grams that are correct, n-grams guessed.

    The reference length is that of the reference closest in length, the shorter of two equally close. A
    prediction's n-gram is correct as often as it occurs in the reference that has it most often.

    Raises ValueError for sequences of different lengths, for a sample without references, and for a string
    where a sequence of words belongs.
    """
    check_samples(predictions, references)
    counts = np.zeros((len(predictions), 2 + 2 * ORDER), dtype=np.int64)
    for row, prediction, sample_references in zip(counts, predictions, references, strict=True):
        ngrams, length = ngram_counts(tuple(prediction))
        reference_ngrams, lengths = zip(
            *(ngram_counts(tuple(reference)) for reference in sample_references), strict=True
        )
        row[0] = length
        row[1] = min(lengths, key=lambda candidate: (abs(candidate - length), candidate))
        for ngram, count in ngrams.items():
            row[1 + len(ngram)] += min(count, max(reference.get(ngram, 0) for reference in reference_ngrams))
        row[2 + ORDER :] = [max(0, length - order) for order in range(ORDER)]
    return counts


def bleu(counts: Num[np.ndarray, "*samples 10"]) -> Float64[np.ndarray, "*samples 4"]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of :func:`bleu_counts`: a score for each row.

    For a corpus give the sum over its samples, `bleu(counts.sum(axis=0))`: corpus BLEU is not the mean of the
    samples' BLEU. For a sample the score is close to 0, not 0, where it has no correct n-gram of some order
    (coco-caption's way; there is no other smoothing).
    """
    length, reference_length = counts[..., 0:1], counts[..., 1:2]
    correct, guessed = counts[..., 2 : 2 + ORDER], counts[..., 2 + ORDER :]
    precision = (correct + _TINY) / (guessed + _SMALL)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    # exp(1 - 1/ratio) of an empty prediction is exp(-10^16): 0, as it should be.
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDER + 1)) * brevity


def rouge_l(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2
) -> Float64[np.ndarray, "samples"]:
    """ROUGE-L (Lin 2004) of each sample: F-score of the longest common subsequence.

    Precision and recall are each the best over the references, possibly of two different ones:
    `(1 + β²) P R / (R + β² P)`. A corpus's score is the mean. An empty prediction scores 0 (coco-caption
    gives 1 for an empty prediction where a reference is empty too).

    Raises ValueError as :func:`bleu_counts`.
    """
    check_samples(predictions, references)
    scores = np.zeros(len(predictions))
    for index, (prediction, sample_references) in enumerate(zip(predictions, references, strict=True)):
        common = [
            (_common_subsequence(prediction, reference), len(reference)) for reference in sample_references
        ]
        longest = max(length for length, _ in common)
        if longest:
            precision = longest / len(prediction)
            recall = max(length / max(1, reference_length) for length, reference_length in common)
            scores[index] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def check_samples(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    """Raise ValueError unless every prediction has references, and all are sequences of words."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} samples")
    for prediction, sample_references in zip(predictions, references, strict=True):
        if not sample_references:
            raise ValueError("every sample needs at least one reference")
        # A string is a sequence of strings too: of its letters.
        if any(isinstance(caption, str) for caption in (prediction, sample_references, *sample_references)):
            raise ValueError("captions must be sequences of words, not strings: tokenise them first")


def _common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, one row of the usual table at a time as the bits of a number.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited": a 0 at bit i says that the row's value grows
    by one from `first[:i]` to `first[:i + 1]`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


Vector = tuple[Mapping[tuple[str, ...], float], tuple[float, ...], int]


@dataclass(frozen=True, eq=False)
class DocumentFrequencies:
    """Count in how many of `images` images some reference has an n-gram."""

    counts: Mapping[tuple[str, ...], int]
    images: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("document frequencies need at least one image")

    @classmethod
    def of(cls, references: Sequence[Sequence[Words]]) -> "DocumentFrequencies":
        """The frequencies in these references: a sequence of captions for every image."""
        counts: Counter[tuple[str, ...]] = Counter()
        for sample_references in references:
            counts.update(
                {ngram for reference in sample_references for ngram in ngram_counts(tuple(reference))[0]}
            )
        return cls(counts, len(references))


class CiderD:
    """CIDEr-D with given document frequencies. Call it with predictions and references.

    An n-gram that no reference has counts as one that a single image has. With the frequencies of one image
    every weight is log(1/1): every score is 0.

    `sigma` is the width of the length penalty in words. The vectors of captions seen lately are kept, so that
    an instance that lives through a training run does the references' work once.
    """

    def __init__(self, frequencies: DocumentFrequencies, sigma: float = 6.0) -> None:
        self.frequencies = frequencies
        self.sigma = sigma
        self._log_images = math.log(frequencies.images)
        self._vector = lru_cache(maxsize=1 << 14)(self._make_vector)

    def __call__(
        self, predictions: Sequence[Words], references: Sequence[Sequence[Words]]
    ) -> Float64[np.ndarray, "samples"]:
        """The score of each sample, between 0 and 10. A corpus's score is the mean.

        Raises ValueError for sequences of different lengths, for a sample without references, and for a
        string where a sequence of words belongs.
        """
        check_samples(predictions, references)
        scores = np.zeros(len(predictions))
        for index, (prediction, sample_references) in enumerate(zip(predictions, references, strict=True)):
            vector = self._vector(tuple(prediction))
            similarity = sum(
                self._similarity(vector, self._vector(tuple(reference))) for reference in sample_references
            )
            scores[index] = 10 * similarity / len(sample_references)
        return scores

    def _make_vector(self, words: tuple[str, ...]) -> Vector:
        """TF-IDF weight of every n-gram, norm of the weights of each order, and the length.

        The term frequency is the count itself: equation 1's division by the number of n-grams cancels in the
        cosine, but not under CIDEr-D's clipping, and coco-caption leaves it out.

        Length is counted in bigrams, as in coco-caption, so one word and none are equally long.
        """
        counts, length = ngram_counts(words)
        frequency = self.frequencies.counts
        weights = {
            ngram: count * (self._log_images - math.log(max(1, frequency.get(ngram, 0))))
            for ngram, count in counts.items()
        }
        squares = [0.0] * ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, tuple(map(math.sqrt, squares)), max(0, length - 1)

    def _similarity(self, prediction: Vector, reference: Vector) -> float:
        """Mean over the orders of the clipped cosine, times the length penalty."""
        (weights, norms, length), (reference_weights, reference_norms, reference_length) = (
            prediction,
            reference,
        )
        products = [0.0] * ORDER
        for ngram, weight in weights.items():  # in order: that of a set differs from process to process
            other = reference_weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, other) * other
        cosines = (
            product / (norm * reference_norm)
            for product, norm, reference_norm in zip(products, norms, reference_norms, strict=True)
            if norm and reference_norm
        )
        return sum(cosines) / ORDER * math.exp(-((length - reference_length) ** 2) / (2 * self.sigma**2))


def cider_d(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0
) -> Float64[np.ndarray, "samples"]:
    """CIDEr-D of each sample, with the document frequencies of these very references, as COCO evaluates.

    A sample's score therefore depends on which other samples are there; a single image always scores 0. For
    frequencies from elsewhere use :class:`CiderD`. Raises ValueError as it does.
    """
    check_samples(predictions, references)
    if not predictions:
        return np.zeros(0)
    return CiderD(DocumentFrequencies.of(references), sigma)(predictions, references)
