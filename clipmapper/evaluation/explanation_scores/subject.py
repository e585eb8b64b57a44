"""The samples and the model that a score of explanations sees: callables, not how they are made."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipmapper.evaluation.perturbation import ModalityRelevance, VariantScorer, kept_indices


@runtime_checkable
class Subject(Protocol):
    """Some samples of a model that is explained.

    Attributes
    ----------
    sample_ids : numbers that seed what is random of each sample.
    modalities : of "image" and "text", those whose tokens can be taken away.
    images : what the image tower reads, normalised. ``grid``: its (rows, columns) of patches.
    removable_text, text_valid : as of :func:`clipmapper.evaluation.perturbation.perturb`.
    certainty : the score that is the model's certainty, between 0 and 1, of what is explained:
        what is said of the untouched sample.
    layers : parameters in groups from the output to the input, each with a name.
    """

    sample_ids: Int[np.ndarray, "samples"]
    modalities: tuple[str, ...]
    images: Float[Tensor, "samples 3 height width"]
    grid: tuple[int, int]
    removable_text: Bool[Tensor, "samples tokens"]
    text_valid: Bool[Tensor, "samples tokens"]
    certainty: str

    @property
    def layers(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]: ...

    def scorer(self, replacement: str | None = None) -> VariantScorer:
        """Score variants whose tokens that are not kept are removed, or replaced
        (:data:`~clipmapper.evaluation.explanation_scores.replacement.REPLACEMENTS`)."""

    def certain(self) -> VariantScorer:
        """Score variants, with tokens removed, by the ``certainty`` alone."""

    def certainty_of(
        self, sample: Int[np.ndarray, "variants"], images: Float[Tensor, "variants 3 height width"]
    ) -> Float[np.ndarray, "variants"]:
        """The ``certainty`` at these images, with the rest of the samples as it is."""

    def maps(
        self,
        images: Float[Tensor, "samples 3 height width"] | None = None,
        methods: Sequence[str] | None = None,
    ) -> Mapping[str, ModalityRelevance]:
        """Explanations of the same thing by these methods (None: all), at these images, by the model as it
        now is."""


class OneScore:
    """A :class:`~clipmapper.evaluation.perturbation.VariantScorer` with one of the scores of another."""

    def __init__(self, scorer: VariantScorer, name: str) -> None:
        self._scorer, self._place, self.names = scorer, scorer.names.index(name), (name,)

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        return self._scorer.unperturbed(batch_size)[:, [self._place]]

    def score(
        self,
        sample: Int[np.ndarray, "variants"],
        image_keep: Int[Tensor, "variants kept_patches"] | None,
        text_keep: Int[Tensor, "variants kept_tokens"] | None,
    ) -> Float[np.ndarray, "variants scores"]:
        return self._scorer.score(sample, image_keep, text_keep)[:, [self._place]]


def certainties(
    scorer: VariantScorer,
    sample: Int[np.ndarray, "variants"],
    image: Bool[np.ndarray, "variants patches"] | None,
    text: Bool[np.ndarray, "variants tokens"] | None,
    batch_size: int,
) -> Float[np.ndarray, "variants"]:
    """The only score of variants that keep these patches and tokens (None: all): equal ones once, and those
    that keep equally many patches in one forward."""
    kept = [one for one in (image, text) if one is not None]
    rows = np.concatenate([sample[:, None], *(np.packbits(one, axis=1) for one in kept)], axis=1)
    _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    count = np.zeros(len(first)) if image is None else image[first].sum(axis=1)
    found = np.empty(len(first))
    for many in np.unique(count):
        same = np.flatnonzero(count == many)
        for part in np.split(same, range(batch_size, len(same), batch_size)):
            keeps = [None if one is None else kept_indices(one[first[part]]) for one in (image, text)]
            found[part] = scorer.score(sample[first[part]], *keeps)[:, 0]
    return found[kind.reshape(-1)]
