"""The usual scores of generated captions, in one call or over batches, and how much each word counts."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from torchmetrics import Metric

from clipmapper.errors import UserError
from clipmapper.evaluation.captions import java_scores
from clipmapper.evaluation.captions.ngram_scores import (
    ORDER,
    CiderD,
    DocumentFrequencies,
    bleu,
    bleu_counts,
    cider_d,
    rouge_l,
)
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise

BLEU_NAMES = tuple(f"bleu_{order}" for order in range(1, ORDER + 1))
# "cider" is CIDEr-D, as everywhere in the literature.
JAVA_FREE = (*BLEU_NAMES, "rouge_l", "cider")
_JAVA = MappingProxyType({"meteor": java_scores.meteor, "spice": java_scores.spice})
SCORES = (*JAVA_FREE, *_JAVA)


@dataclass(frozen=True)
class CaptionScoresResult:
    """`corpus`: the score of all samples by name. `samples`: each sample's score, in the order given."""

    corpus: Mapping[str, float]
    samples: Mapping[str, Float64[np.ndarray, "samples"]]


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Sequence[str] = JAVA_FREE,
    frequencies: DocumentFrequencies | None = None,
) -> CaptionScoresResult:
    """Score plain captions, one for each image, against the image's references.

    Captions are tokenised here as COCO's evaluation does. `scores` are names from `SCORES`; the default needs
    no Java. `frequencies` are CIDEr's document frequencies, by default those of these very references.

    Corpus BLEU and METEOR come from counts summed over the samples; the others are means. Without samples
    every score is NaN.

    Raises UserError for an unknown score and for "meteor" and "spice" where :mod:`java_scores` cannot compute
    them; ValueError for sequences of different lengths, for an image without references, and for one string
    where a sequence of them belongs.
    """
    check_scores(scores)
    _check_captions(predictions, references)
    predicted = [ptb_tokenise(caption) for caption in predictions]
    truth = [[ptb_tokenise(caption) for caption in captions] for captions in references]
    if not predicted:
        return CaptionScoresResult(dict.fromkeys(scores, math.nan), dict.fromkeys(scores, np.zeros(0)))

    corpus: dict[str, float] = {}
    samples: dict[str, Float64[np.ndarray, "samples"]] = {}
    if set(scores) & set(BLEU_NAMES):
        counts = bleu_counts(predicted, truth)
        corpus |= zip(BLEU_NAMES, bleu(counts.sum(axis=0)).tolist(), strict=True)
        samples |= zip(BLEU_NAMES, bleu(counts).T, strict=True)
    if "rouge_l" in scores:
        samples["rouge_l"] = rouge_l(predicted, truth)
    if "cider" in scores:
        samples["cider"] = CiderD(frequencies)(predicted, truth) if frequencies else cider_d(predicted, truth)
    for name in ("rouge_l", "cider"):
        if name in samples:
            # Exact, so that the order in which processes are gathered cannot show.
            corpus[name] = math.fsum(samples[name]) / len(predicted)
    for name, compute in _JAVA.items():
        if name in scores:
            corpus[name], samples[name] = compute(predicted, truth)
    return CaptionScoresResult(
        {name: corpus[name] for name in scores}, {name: samples[name] for name in scores}
    )


class CaptionScores(Metric):
    """`score_captions` over batches and processes: `compute` returns the scores of all captions, by name.

    The state is the captions themselves, because CIDEr's document frequencies are those of all references,
    also of other processes'. Each process then scores all captions (5,000 of them in a few seconds),
    and every split over batches and processes gives the same numbers.

    `scores` and `frequencies` as in `score_captions`. Raises UserError at construction, not after an epoch,
    for an unknown score and where Java or a package is missing.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    captions: list[UInt8[Tensor, "bytes"]]

    def __init__(
        self, scores: Sequence[str] = JAVA_FREE, frequencies: DocumentFrequencies | None = None
    ) -> None:
        super().__init__()
        check_scores(scores)
        self._scores = tuple(scores)
        self._frequencies = frequencies
        # Processes can exchange tensors only: each sample is a line of JSON in bytes.
        self.add_state("captions", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add images: for each its predicted caption and its references.

        Raises ValueError, and adds nothing, where `score_captions` does.
        """
        _check_captions(predictions, references)
        lines = "".join(
            json.dumps([prediction, list(captions)]) + "\n"
            for prediction, captions in zip(predictions, references, strict=True)
        )
        self.captions.append(_bytes(lines, self.device))

    def sync(self, *args, **kwargs) -> None:
        """Gather the captions of all processes."""
        # torchmetrics stands in for an empty list with float32, which cannot be gathered with bytes: a
        # process that saw no image would stop the others.
        self.captions = [*self.captions] if self.captions else [_bytes("", self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The scores by name as scalar float32 tensors; NaN where no image was seen."""
        result = score_captions(*self._collected(), self._scores, self._frequencies)
        return {
            name: torch.tensor(score, dtype=torch.float32, device=self.device)
            for name, score in result.corpus.items()
        }

    def _collected(self) -> tuple[list[str], list[list[str]]]:
        # One tensor after a synchronisation, a list of them otherwise.
        parts = self.captions if isinstance(self.captions, list) else [self.captions]
        lines = b"".join(part.cpu().numpy().tobytes() for part in parts).decode("ascii").splitlines()
        samples = [json.loads(line) for line in lines]
        return [prediction for prediction, _ in samples], [captions for _, captions in samples]


def check_scores(scores: Sequence[str]) -> None:
    """Raise UserError for a score that is unknown, or that this machine cannot compute."""
    if unknown := sorted(set(scores) - set(SCORES)):
        raise UserError(f"unknown caption scores {unknown}: choose from {list(SCORES)}")
    for name in _JAVA:
        if name in scores and (missing := java_scores.missing_for(name)):
            raise UserError(missing)


def _check_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(predictions, str) or any(isinstance(captions, str) for captions in references):
        raise ValueError("give a sequence of captions, and for each image a sequence of references")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} images")
    if not all(references):
        raise ValueError("every image needs at least one reference")


def _bytes(text: str, device: torch.device) -> UInt8[Tensor, "bytes"]:
    # json.dumps writes ASCII. Through numpy, and copied: torch warns about memory that it may not write to.
    return torch.from_numpy(np.frombuffer(text.encode("ascii"), dtype=np.uint8).copy()).to(device)


WORD_WEIGHTS = ("mean", "cider", "clip")

# English words that say nothing of what is to be seen. Words of place ("left", "above", "next") are not among
# them, as they are in the usual lists made for retrieval: a caption can be wrong in them.
STOP_WORDS = frozenset(
    (
        "a", "an", "the", "and", "or", "but", "nor", "so", "of", "to", "in", "on", "at", "by", "for",
        "from", "with", "without", "into", "onto", "as", "than", "then", "that", "this", "these", "those",
        "it", "its", "he", "she", "they", "him", "her", "their", "we", "our", "you", "your", "i", "my",
        "me", "who", "whom", "which", "whose", "what", "where", "when", "is", "are", "was", "were", "be",
        "been", "being", "am", "do", "does", "did", "has", "have", "had", "having", "will", "would",
        "can", "could", "may", "might", "must", "shall", "should", "there", "here", "not", "no", "only",
        "just", "nothing", "some", "any", "each", "both", "all", "very", "too", "also", "see", "image",
        "picture", "photo", "near", "s", "t",
    )
)  # fmt: skip


def is_stop_word(word: str) -> bool:
    """Whether a word counts for nothing: a function word or a punctuation mark."""
    return word.lower() in STOP_WORDS or not any(letter.isalnum() for letter in word)


def mean_weights(words: Sequence[str]) -> Float[np.ndarray, "words"]:
    """Equal for all words but stop-words, which have 0; they sum to 1. Only stop-words: equal for all."""
    counting = np.array([not is_stop_word(word) for word in words], dtype=np.float64)
    if not counting.any():
        counting[:] = 1
    return counting / counting.sum()


def loss_weights(
    words: Sequence[str], score: Callable[[list[str]], Float[np.ndarray, "captions"]]
) -> Float[np.ndarray, "words"]:
    """Weigh words in proportion to what a caption's score loses without them; they sum to 1.

    ``score`` gives the scores of several captions of the same image: CIDEr against its references ("cider"),
    or CLIPScore ("clip"). A word without which the score is no lower has 0; where that is so of all words,
    :func:`mean_weights`.
    """
    shorter = [" ".join([*words[:i], *words[i + 1 :]]) for i in range(len(words))]
    scores = np.asarray(score([" ".join(words), *shorter]), dtype=np.float64)
    lost = np.maximum(scores[0] - scores[1:], 0)
    # Rounding of a score is no loss.
    lost[lost <= 1e-6 * abs(scores[0])] = 0
    return lost / lost.sum() if lost.any() else mean_weights(words)
