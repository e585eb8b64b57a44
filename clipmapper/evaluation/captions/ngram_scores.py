"""BLEU and ROUGE-L as coco-caption computes them (Chen et al. 2015, arXiv 1504.00325).

A caption is a sequence of words; :func:`clipmapper.evaluation.captions.ptb_tokenizer.ptb_tokenise` makes them
as the published scores have them. Every score is one number a sample; BLEU of a corpus comes from summed
counts.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int64

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


def bleu(counts: Int64[np.ndarray, "*samples 10"]) -> Float64[np.ndarray, "*samples 4"]:
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
