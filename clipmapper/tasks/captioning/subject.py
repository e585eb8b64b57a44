"""Images and what a model says of them, as the scores of explanations see them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.evaluation.perturbation import ModalityRelevance, VariantScorer
from clipmapper.evaluation.perturbation_scores import MEAN_PROBABILITY, WORD_PROBABILITY
from clipmapper.models.tokens import TokenizedText, padding_id
from clipmapper.tasks.captioning.caption_maps import caption_map
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.perturbation import (
    CaptionScorer,
    ImageKept,
    WordScorer,
    images_removed,
    images_replaced,
    kept_captions,
    log_probabilities,
)
from clipmapper.tasks.captioning.samples import CaptionSamples
from clipmapper.tasks.captioning.trace import WordRelevance, trace_caption
from clipmapper.tasks.layers import parameter_groups
from clipmapper.tasks.replaced import replacing


@dataclass(frozen=True)
class Said:
    """What the model says of an image.

    ``text``: its tokens. ``weights``: of its words in the caption's map. ``word``: the place of the one that
    is perturbed alone; ``tokens``: those of its tokens among all but the first.
    """

    text: TokenizedText
    weights: Float[np.ndarray, "words"]
    word: int
    tokens: Sequence[int]


class CaptionSubject:
    """A :class:`~clipmapper.evaluation.explanation_scores.subject.Subject`: some of the samples, by their
    positions, with what the model ``said`` of each, which stays what is explained.

    ``test``: "caption", by the caption's map, or "word", one word a caption by its map. ``relevance``: as
    :func:`~clipmapper.tasks.captioning.trace.word_relevance`, by every method.
    """

    modalities = ("image",)

    def __init__(
        self,
        model: Captioner,
        samples: CaptionSamples,
        positions: range,
        said: Sequence[Said],
        test: str,
        *,
        relevance: Callable[..., Mapping[str, WordRelevance]],
        word_maps: str,
        caption_scores: Sequence[str],
        decoding: Decoding,
    ) -> None:
        self._model, self._samples, self._positions, self._test = model, samples, positions, test
        self._said, self._relevance, self._word_maps = said, relevance, word_maps
        self._caption_scores, self._decoding = caption_scores, decoding
        self._rows = torch.tensor(list(positions))
        self._text = together([one.text for one in said], padding_id(model.tokenizer))
        self.certainty = WORD_PROBABILITY if test == "word" else MEAN_PROBABILITY
        self.sample_ids = np.array([samples.ids[i] for i in positions])
        self.images, self.grid = samples.images[self._rows], model.encoder.grid
        self.removable_text, self.text_valid = self._text.removable, self._text.valid

    @property
    def layers(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]:
        return parameter_groups(self._model)

    def scorer(self, replacement: str | None = None) -> VariantScorer:
        """The scores of the caption, or of its word."""
        if replacement is None:
            return self._scorer(images_removed(self._model, self.images), self._caption_scores)
        others = replacing(replacement, self._model.encoder, self._samples, self._rows, self._text)
        return self._scorer(images_replaced(others), self._caption_scores)

    def certain(self) -> VariantScorer:
        return self._scorer(images_removed(self._model, self.images), (MEAN_PROBABILITY,))

    def _scorer(self, image_kept: ImageKept, caption_scores: Sequence[str]) -> VariantScorer:
        kept = kept_captions(self._model, image_kept, self._text, self._decoding)
        if self._test == "word":
            return WordScorer(kept, [one.tokens for one in self._said])
        references = [self._samples.references[i] for i in self._positions]
        return CaptionScorer(kept, references, self._samples.frequencies, self._told(), caption_scores)

    def _told(self) -> Int[np.ndarray, "samples"]:
        """How many tokens of each caption the model says: all but the first."""
        return self.text_valid.sum(dim=1).numpy() - 1

    @torch.no_grad()
    def certainty_of(
        self, sample: Int[np.ndarray, "variants"], images: Float[Tensor, "variants 3 height width"]
    ) -> Float[np.ndarray, "variants"]:
        model, rows = self._model, torch.from_numpy(sample)
        text = self._text[rows].to(model.device)
        image_tokens = model.encoder.image_tokens(images.to(model.device))
        text_tokens = model.text_tokens(text.ids, text.valid)
        told = log_probabilities(model, image_tokens, text_tokens, text, None).double().cpu()
        if self._test == "word":
            return np.array(
                [float(told[k, self._said[i].tokens].sum().exp()) for k, i in enumerate(sample.tolist())]
            )
        return np.exp(told.sum(dim=1).numpy() / self._told()[sample])

    def maps(
        self,
        images: Float[Tensor, "samples 3 height width"] | None = None,
        methods: Sequence[str] | None = None,
    ) -> dict[str, ModalityRelevance]:
        images = self.images if images is None else images
        relevance = self._relevance if methods is None else partial(self._relevance, methods=methods)
        found: dict[str, list[Tensor]] = {}
        for row, said in enumerate(self._said):
            pixels = images[row : row + 1].to(self._model.device)
            traced = trace_caption(self._model, pixels, said.text.to(self._model.device))
            places = [said.word] if self._test == "word" else range(len(traced.words))
            for method, its in relevance(traced, places, sample=int(self.sample_ids[row])).items():
                if self._test == "word":
                    own = its.maps[0]
                else:
                    own = caption_map(its.maps, said.weights, self._word_maps)
                found.setdefault(method, []).append(torch.from_numpy(own).flatten())
        none = torch.zeros(self.text_valid.shape)
        return {method: ModalityRelevance(torch.stack(maps), none) for method, maps in found.items()}


def together(texts: Sequence[TokenizedText], padding: int) -> TokenizedText:
    """One batch of texts of one row each."""
    longest = max(text.ids.shape[1] for text in texts)
    padded = [text.padded(longest, padding) for text in texts]
    return TokenizedText(*(torch.cat([getattr(t, k) for t in padded]) for k in ("ids", "valid", "removable")))
