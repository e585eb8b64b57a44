"""The explained forward of a model with one patch or one word out of its sequence."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipmapper.evaluation.perturbation import kept_indices
from clipmapper.models.encoder import ClipEncoder
from clipmapper.relevance import AttentionTrace


class OneTokenLess(ABC):
    """A :class:`clipmapper.relevance.rerun.Removal` of models that read an image and a text.

    ``words``: which tokens of the text stream can be left out. Of the image stream it is every patch.
    """

    def __init__(
        self, trace: AttentionTrace, encoder: ClipEncoder, words: Bool[Tensor, "samples tokens"]
    ) -> None:
        self._image, self._prefix = trace.image_stream, encoder.prefix_tokens
        patches = torch.arange(trace.lengths[trace.image_stream], device=words.device) >= self._prefix
        self.removable = {trace.image_stream: patches.expand(len(words), -1), trace.text_stream: words}

    def without(
        self, rows: Int[Tensor, "variants"], stream: str, tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants scores"]:
        if stream != self._image:
            return self.without_word(rows, tokens)
        patches = self.removable[stream][rows]
        patches[torch.arange(len(rows), device=rows.device), tokens] = False
        keep = kept_indices(patches[:, self._prefix :].cpu().numpy())
        return self.without_patch(rows, keep.to(rows.device))

    @abstractmethod
    def without_patch(
        self, rows: Int[Tensor, "variants"], keep: Int[Tensor, "variants kept"]
    ) -> Float[Tensor, "variants scores"]:
        """What the forward gives for these samples with the patches that stay."""

    @abstractmethod
    def without_word(
        self, rows: Int[Tensor, "variants"], tokens: Int[Tensor, "variants"]
    ) -> Float[Tensor, "variants scores"]:
        """What it gives without these tokens of the text."""
