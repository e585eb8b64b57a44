"""The captions that a model writes of samples, each explained."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipmapper.evaluation.captions.ngram_scores import CiderD
from clipmapper.evaluation.captions.scores import is_stop_word
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import CaptionExplanation, caption_word_weights
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.samples import CaptionSamples
from clipmapper.tasks.captioning.subject import Said
from clipmapper.tasks.captioning.trace import TracedCaption, WordRelevance, trace_caption
from clipmapper.training.explained import DRAWN_WORDS


def written_captions(
    model: Captioner,
    samples: CaptionSamples,
    methods: Sequence[str],
    relevance: Callable[..., Mapping[str, WordRelevance]],
    *,
    decoding: Decoding,
    word_weights: str,
    word_maps: str,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, list[CaptionExplanation]], list[Said]]:
    """Every method's explanations of the captions, and what was said, with one word of each caption drawn by
    ``seed``. ``relevance``: as :func:`~clipmapper.tasks.captioning.trace.word_relevance`, by every method."""
    whole: list[dict[str, CaptionExplanation]] = []
    said: list[Said] = []
    for row, sample in enumerate(samples.ids):
        pixels = samples.images[row : row + 1].to(model.device)
        traced = trace_caption(model, pixels, decoding=decoding)
        whole.append(
            _explained(model, traced, samples, row, relevance, word_weights=word_weights, word_maps=word_maps)
        )
        word = _chosen_word([word for word, _ in traced.words], seed, sample)
        weights = next(iter(whole[-1].values())).weights
        tokens = [p - 1 for p in traced.words[word][1]]
        said.append(Said(traced.text.to("cpu"), weights, word, tokens))
        if progress is not None:
            progress(0)  # no point of a curve yet, but whoever wants to stop can
    return {m: [by_method[m] for by_method in whole] for m in methods}, said


def _explained(
    model: Captioner,
    traced: TracedCaption,
    samples: CaptionSamples,
    row: int,
    relevance: Callable[..., Mapping[str, WordRelevance]],
    *,
    word_weights: str,
    word_maps: str,
) -> dict[str, CaptionExplanation]:
    places = tuple(range(len(traced.words)))
    found = relevance(traced, places, sample=samples.ids[row])
    words = tuple(word for word, _ in traced.words)
    weights = caption_word_weights(
        model, traced, word_weights, samples.references[row], CiderD(samples.frequencies)
    )
    return {
        name: CaptionExplanation(
            caption=traced.caption,
            words=words,
            explained=places,
            maps=its.maps,
            word_matrix=its.matrix,
            probabilities=traced.word_probabilities(places),
            weights=weights,
            word_weights=word_weights,
            image=samples.pictures[row],
            method=name,
            word_maps=word_maps,
        )
        for name, its in found.items()
    }


def _chosen_word(words: Sequence[str], seed: int, sample: int) -> int:
    """One word of a caption at random, no stop-word where there are others: one curve an image, so that
    images, which are what intervals are over, count alike."""
    places = [place for place, word in enumerate(words) if not is_stop_word(word)] or list(range(len(words)))
    return int(np.random.default_rng((seed, sample, DRAWN_WORDS)).choice(places))
