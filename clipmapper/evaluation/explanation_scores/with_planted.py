"""Samples whose explanations have planted maps beside them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.evaluation.explanation_scores.planted import Deciding, is_planted, planted_maps
from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.perturbation import ModalityRelevance, VariantScorer


class WithPlanted:
    """A :class:`~clipmapper.evaluation.explanation_scores.subject.Subject` with the planted maps behind those
    of the methods, so that scores that explain again find them too.

    All but the edges, which are of the images given, stay what they are whatever happens to images and
    weights: they are stable, and sanity must call them unchanged.
    """

    def __init__(self, subject: Subject, deciding: Deciding, seed: int) -> None:
        self._subject, self._deciding, self._seed = subject, deciding, seed
        self.sample_ids, self.modalities = subject.sample_ids, subject.modalities
        self.images, self.grid = subject.images, subject.grid
        self.removable_text, self.text_valid = subject.removable_text, subject.text_valid
        self.certainty = subject.certainty

    @property
    def layers(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]:
        return self._subject.layers

    def scorer(self, replacement: str | None = None) -> VariantScorer:
        return self._subject.scorer(replacement)

    def certain(self) -> VariantScorer:
        return self._subject.certain()

    def certainty_of(
        self, sample: Int[np.ndarray, "variants"], images: Float[Tensor, "variants 3 height width"]
    ) -> Float[np.ndarray, "variants"]:
        return self._subject.certainty_of(sample, images)

    def maps(
        self,
        images: Float[Tensor, "samples 3 height width"] | None = None,
        methods: Sequence[str] | None = None,
    ) -> dict[str, ModalityRelevance]:
        if methods is None:
            return {**self._subject.maps(images), **self.planted(images)}
        own = [method for method in methods if not is_planted(method)]
        found = dict(self._subject.maps(images, own)) if own else {}
        if len(own) < len(methods):
            found |= {method: its for method, its in self.planted(images).items() if method in methods}
        return found

    def planted(
        self, images: Float[Tensor, "samples 3 height width"] | None = None
    ) -> dict[str, ModalityRelevance]:
        """The planted maps alone."""
        return planted_maps(
            self._deciding,
            self.images if images is None else images,
            tokens=self.text_valid.shape[1],
            sample_ids=self.sample_ids,
            seed=self._seed,
        )
