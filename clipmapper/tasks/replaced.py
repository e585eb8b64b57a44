"""The tokens of images and texts some of whose patches and words are replaced, and not removed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipmapper.data.pixels import normalised
from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.replacement import (
    blurred,
    mean_patches,
    other_words,
    patches_replaced,
)
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import TokenizedText
from clipmapper.training.explained import Samples


@dataclass(frozen=True)
class Replacing:
    """Samples of a batch, and what stands in the place of what a variant does not keep.

    ``patches``: images whose patches are taken. ``words``: token ids that are; None: the mean of the text
    tower's word embeddings.
    """

    encoder: ClipEncoder
    images: Float[Tensor, "samples 3 height width"]
    patches: Float[Tensor, "samples 3 height width"]
    text: TokenizedText
    words: Int[Tensor, "samples tokens"] | None = None

    def image_tokens(
        self, sample: Int[Tensor, "variants"], keep: Int[Tensor, "variants kept"]
    ) -> Float[Tensor, "variants tokens channels"]:
        """Of the images with other patches at all places but those of ``keep``."""
        grid = self.encoder.grid
        return self.encoder.image_tokens(
            patches_replaced(self.images[sample], self.patches[sample], keep, grid)
        )

    def text_tokens(
        self, sample: Int[Tensor, "variants"], keep: Int[Tensor, "variants kept_text"]
    ) -> Float[Tensor, "variants out width"]:
        """Of the texts with other words at all places but those of ``keep``, which is padded with −1."""
        valid = self.text.valid[sample]
        kept = torch.zeros_like(valid).scatter_reduce(1, keep.clamp(min=0), keep >= 0, "amax")
        gone, ids = valid & ~kept, self.text.ids[sample]
        if self.words is not None:
            return self.encoder.text_tokens(torch.where(gone, self.words[sample], ids), valid)
        with _mean_embedding(self.encoder, gone):
            return self.encoder.text_tokens(ids, valid)


@contextmanager
def _mean_embedding(encoder: ClipEncoder, gone: Bool[Tensor, "variants tokens"]) -> Iterator[None]:
    """Have the text tower embed these tokens as the mean of all its words."""
    embedding = encoder.text_tower.owner.token_embedding
    mean = embedding.weight.mean(dim=0)

    def replace(module, args, output: Tensor) -> Tensor:
        # A tower that reads its padding was given more of it.
        places = torch.nn.functional.pad(gone, (0, output.shape[1] - gone.shape[1]), value=False)
        return torch.where(places[..., None], mean.to(output.dtype), output)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def replacing(
    kind: str,
    encoder: ClipEncoder,
    samples: Samples,
    rows: Int[Tensor, "samples"],
    text: TokenizedText,
    all_text: TokenizedText | None = None,
) -> Replacing:
    """What stands in the place of the tokens of the samples ``rows``, by a kind of
    :data:`~clipmapper.evaluation.explanation_scores.replacement.REPLACEMENTS`.

    ``text``: of these rows. ``all_text``: of all samples, where words are replaced. Raises ``UserError``
    where the samples have nothing of this kind.
    """
    images = samples.images[rows]
    others = torch.tensor([samples.others[row] for row in rows.tolist()])
    if kind == "other" and (others < 0).any():
        raise UserError(
            "scores: replace_other takes patches of another image, and all samples are of the same one"
        )
    if kind == "mean":
        patches = mean_patches(images, encoder.grid)
    elif kind == "blur":
        patches = blurred(images, encoder.grid)
    elif kind == "grey":
        grey = torch.full(images.shape, 128, dtype=torch.uint8)
        patches = normalised(grey, encoder.clip.visual)
    elif kind == "other":
        patches = samples.all_images[others]
    else:
        patches = _backgrounds(encoder, samples, rows)
    words = None
    if kind == "other" and all_text is not None:
        words = other_words(text.ids, text.removable, all_text.ids[others], all_text.removable[others])
    device = next(encoder.parameters()).device
    return Replacing(encoder, images.to(device), patches.to(device), text.to(device), _on(words, device))


def _on(words: Tensor | None, device: torch.device) -> Tensor | None:
    return None if words is None else words.to(device)


def _backgrounds(encoder: ClipEncoder, samples: Samples, rows: Int[Tensor, "samples"]) -> Tensor:
    found = []
    for row in rows.tolist():
        background = getattr(samples.known[row], "background", None)
        if background is None:
            raise UserError(
                "scores: replace_background needs the picture without its objects, which only the built-in "
                "world has; others are replace_mean, replace_blur, replace_grey and replace_other"
            )
        found.append(encoder.load_image(background().read()))
    return torch.cat(found)
