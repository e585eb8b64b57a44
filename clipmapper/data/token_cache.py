"""Tokens of a frozen encoder, computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TokenCache:
    """Image tokens of every image and text tokens of every different text, in half precision."""

    image_tokens: Float[Tensor, "images image_tokens image_width"]
    text_tokens: Float[Tensor, "texts text_tokens text_width"]
    text_valid: Bool[Tensor, "texts text_tokens"]
    text_of: Int[Tensor, "questions"]
    image_of: Int[Tensor, "questions"]

    def images(self, questions: Int[Tensor, "batch"]) -> Float[Tensor, "batch image_tokens image_width"]:
        """Image tokens of some questions."""
        return self.image_tokens[self.image_of[questions]].float()

    def texts(self, questions: Int[Tensor, "batch"]) -> dict[str, Tensor]:
        """``text_tokens`` and ``text_valid`` of some questions, cut to the longest of them."""
        texts = self.text_of[questions]
        valid = self.text_valid[texts]
        length = int(valid.sum(dim=1).max())
        return {"text_tokens": self.text_tokens[texts, :length].float(), "text_valid": valid[:, :length]}


@torch.no_grad()
def build_image_cache(
    encode_images: Callable[[np.ndarray], Tensor],
    images: np.ndarray,
    *,
    batch_size: int = 256,
    progress: Progress = lambda done: None,
) -> Float[Tensor, "images image_tokens image_width"]:
    """Tokens of every image, in half precision. Arguments as of :func:`build_token_cache`."""
    tokens = []
    for start in range(0, len(images), batch_size):
        tokens.append(encode_images(images[start : start + batch_size]).half().cpu())
        progress(len(tokens[-1]))
    return torch.cat(tokens)


@torch.no_grad()
def build_token_cache(
    encode_images: Callable[[np.ndarray], Tensor],
    encode_texts: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    images: np.ndarray,
    texts: Sequence[str],
    image_of: np.ndarray,
    *,
    batch_size: int = 256,
    progress: Progress = lambda done: None,
) -> TokenCache:
    """``encode_images``: uint8 images → tokens. ``encode_texts``: texts → (tokens, valid).

    ``progress`` is told how many images or texts were added.
    """
    image_tokens = build_image_cache(encode_images, images, batch_size=batch_size, progress=progress)
    different = sorted(set(texts))
    position = {text: i for i, text in enumerate(different)}
    text_tokens, text_valid = [], []
    for start in range(0, len(different), batch_size):
        tokens, valid = encode_texts(different[start : start + batch_size])
        text_tokens.append(tokens.half().cpu())
        text_valid.append(valid.cpu())
        progress(len(tokens))
    longest = max(t.shape[1] for t in text_tokens)
    pad = torch.nn.functional.pad
    return TokenCache(
        image_tokens=image_tokens,
        text_tokens=torch.cat([pad(t, (0, 0, 0, longest - t.shape[1])) for t in text_tokens]),
        text_valid=torch.cat([pad(v, (0, longest - v.shape[1])) for v in text_valid]),
        text_of=torch.tensor([position[text] for text in texts]),
        image_of=torch.from_numpy(np.asarray(image_of)),
    )
