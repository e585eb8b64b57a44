"""Maps of captions and of their words, held against the pixels that they speak of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np

from clipmapper.evaluation.localisation import Localisation, image_localisation
from clipmapper.tasks.captioning.explain import CaptionExplanation
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.samples import CaptionSamples
from clipmapper.tasks.captioning.trace import WordRelevance, trace_caption


def localised_words(
    model: Captioner,
    samples: CaptionSamples,
    methods: Sequence[str],
    relevance: Callable[..., Mapping[str, WordRelevance]],
) -> dict[str, dict[str, Localisation]]:
    """Localise the words of true captions that speak of something to be seen.

    ``relevance(traced, places, sample=...)``: as :func:`~clipmapper.tasks.captioning.trace.word_relevance`,
    by every method. Returns method → kind of word → an entry a caption.
    """
    gathered: dict[str, dict[str, list[Localisation]]] = {method: {} for method in methods}
    for row, known in enumerate(samples.spoken):
        if known is None or not known.words:
            continue
        pixels = samples.images[row : row + 1].to(model.device)
        traced = trace_caption(model, pixels, known.text)
        places = sorted(known.words)
        kinds = np.array([known.words[place][0] for place in places])
        masks = [known.words[place][1] for place in places]
        found = relevance(traced, places, sample=samples.ids[row])
        for method, its in found.items():
            scores = image_localisation(np.maximum(its.maps, 0), masks)
            for kind in sorted(set(kinds)):
                gathered[method].setdefault(str(kind), []).append(_mean(scores, kinds == kind))
    return {
        method: {kind: Localisation.concatenate(entries) for kind, entries in sorted(by_kind.items())}
        for method, by_kind in gathered.items()
    }


def localised_captions(
    samples: CaptionSamples, explanations: Mapping[str, Sequence[CaptionExplanation]]
) -> dict[str, dict[str, Localisation]]:
    """The map of the whole caption against the pixels that it should speak of, where these are known."""
    rows = _with_mask(samples)
    if not rows:
        return {}
    masks = [samples.masks[row] for row in rows]
    return {
        method: {
            "caption": image_localisation(np.maximum(np.stack([its[row].patches for row in rows]), 0), masks)
        }
        for method, its in explanations.items()
    }


def located_rows(samples: CaptionSamples) -> dict[str, list[int]]:
    """The samples that the entries of both are of: kind of word, or "caption" → places."""
    rows: dict[str, list[int]] = {"caption": _with_mask(samples)}
    for row, known in enumerate(samples.spoken):
        for kind in sorted({kind for kind, _ in known.words.values()} if known is not None else ()):
            rows.setdefault(kind, []).append(row)
    return rows


def _with_mask(samples: CaptionSamples) -> list[int]:
    return [row for row, mask in enumerate(samples.masks) if mask is not None and mask.any()]


def _mean(scores: Localisation, chosen: np.ndarray) -> Localisation:
    """The words of one kind of one caption as one entry: words of a caption are no independent samples."""
    names = (score.name for score in fields(Localisation))
    return Localisation(*(np.array([getattr(scores, name)[chosen].mean()]) for name in names))
