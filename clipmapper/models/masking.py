"""Leaving tokens out of attention: by a mask, or by taking them out of the sequence."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def select_tokens(
    tokens: Float[Tensor, "batch tokens channels"], keep: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept channels"]:
    """The tokens at the indices ``keep``; -1 (padding behind the last kept index) repeats token 0."""
    index = keep.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index)


def ignored_keys_mask(
    ignored: Bool[Tensor, "batch tokens"], dtype: torch.dtype
) -> Float[Tensor, "batch tokens tokens"]:
    """Added to attention scores, takes the ignored keys out of every row.

    The most negative finite number and not -inf: a row in which every key is ignored stays finite.
    """
    n = ignored.shape[1]
    mask = torch.zeros(ignored.shape, dtype=dtype, device=ignored.device)
    mask.masked_fill_(ignored, torch.finfo(dtype).min)
    return mask[:, None, :].expand(-1, n, -1)


def causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 queries keys"]:
    """True where the last ``queries`` of ``keys`` tokens read: themselves and what comes before them."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def step_mask(new: int, past: int, device: torch.device) -> Bool[Tensor, "1 1 new keys"] | None:
    """The same for ``new`` tokens behind ``past`` others; a single one reads all, which takes no mask."""
    return None if new == 1 else causal_mask(new, past + new, device)
