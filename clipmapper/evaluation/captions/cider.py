"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 4), as coco-caption computes it.

What papers on captioning call CIDEr is CIDEr-D: clipped counts, a penalty on the difference in length, times
ten. It is also the reward of self-critical training.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from clipmapper.evaluation.captions.ngram_scores import ORDER, Words, check_samples, ngram_counts

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
        for ngram in weights.keys() & reference_weights.keys():
            other = reference_weights[ngram]
            products[len(ngram) - 1] += min(weights[ngram], other) * other
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
