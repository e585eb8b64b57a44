"""Captions of images of which some patches were removed."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.model import Captioner

# Scores of words held at a time: of 512 captions of 30 tokens, 49408 a token are 3 GB.
_MOST_SCORES = 2**26


@torch.no_grad()
def kept_captions(
    model: Captioner,
    images: Num[Tensor, "samples 3 height width"],
    text: TokenizedText,
    decoding: Decoding,
) -> Callable[
    [Int[Tensor, "variants"], Int[Tensor, "variants kept"] | None, bool],
    tuple[Float[Tensor, "variants told"], Sequence[str] | None],
]:
    """A function that captions these images with some of their patches removed.

    ``function(sample, image_keep, write)`` → the log-probability of every token of the given captions but the
    first, 0 at padding, and, where ``write``, the captions that the model writes from what is left.
    ``sample`` are positions in this batch, ``image_keep`` the patches that stay (None: all). The text tower,
    which does not read the image, runs once; a variant's image tower runs once for both, behind patches that
    are embedded once.
    """
    images, text = images.to(model.device), text.to(model.device)
    tower = model.encoder.image_tower
    embedded, rotary = tower.embed(images)
    text_tokens = model.text_tokens(text.ids, text.valid)

    @torch.no_grad()
    def function(
        sample: Int[Tensor, "variants"], image_keep: Int[Tensor, "variants kept"] | None, write: bool
    ) -> tuple[Float[Tensor, "variants told"], Sequence[str] | None]:
        sample = sample.to(model.device)
        keep = None if image_keep is None else image_keep.to(model.device)
        image_tokens = tower.behind(embedded[sample], rotary, keep=keep)
        told = _log_probabilities(model, image_tokens, text_tokens[sample], text[sample], keep)
        if not write:
            return told, None
        written = write_captions(model, image_tokens, decoding, keep=keep)
        return told, [texts[0] for texts in written.texts]

    return function


def _log_probabilities(
    model: Captioner,
    image_tokens: Float[Tensor, "variants image image_width"],
    text_tokens: Float[Tensor, "variants tokens text_width"],
    text: TokenizedText,
    keep: Int[Tensor, "variants kept"] | None,
) -> Float[Tensor, "variants told"]:
    """Log-probability of every token but the first, given those before it; 0 at padding."""
    wanted = text.valid[:, 1:]
    place = model.head.places(text.ids[:, 1:], wanted)
    rows = max(1, _MOST_SCORES // (text.ids.shape[1] * model.head.known))
    told = []
    for start in range(0, len(place), rows):
        part = slice(start, start + rows)
        logits = model.caption_logits(
            image_tokens[part],
            text_tokens[part],
            text.valid[part],
            keep=None if keep is None else keep[part],
            known_only=True,
        )[:, :-1].float()
        chosen = logits.gather(2, place[part, :, None])[..., 0]
        # Not log_softmax, which would be a second tensor of that size: one token of each is asked for.
        told.append((chosen - logits.logsumexp(dim=2)).masked_fill(~wanted[part], 0.0))
    return torch.cat(told)
