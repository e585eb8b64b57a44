"""The two kinds of sub-layer that the mapper is made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values of new tokens [batch heads new channels]; gives those of all tokens up to now."""


class KeysValues(NamedTuple):
    """Keys and values of some tokens, computed once for queries that come one after another."""

    key: Float[Tensor, "batch heads keys channels"]
    value: Float[Tensor, "batch heads keys channels"]


class AttentionSublayer(nn.Module):
    """Pre-LayerNorm multi-head attention: what it adds to the residual stream of its queries.

    With ``cross`` the keys and values come from another stream, which has a LayerNorm of its own here.
    """

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.cross = cross
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width) if cross else None
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        # As torch's own nn.MultiheadAttention begins. With nn.Linear's default, a third of that variance,
        # attention begins almost uniform and is slow to find what a question names.
        for weight in (self.query.weight, self.key_value.weight[:width]):
            nn.init.xavier_uniform_(weight)

    def forward(
        self,
        tokens: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys width"] | KeysValues | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        remember: Remember | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """``context`` None: ``tokens`` attend themselves. ``mask``: True where a query may read a key.

        ``remember``: ``tokens`` also attend those that came before them, whose keys and values it holds.
        A ``context`` of :meth:`keys_values` may have fewer rows than ``tokens``, each then for as many rows
        in succession (several captions of one image), and no mask.
        """
        normed = self.norm(tokens)
        query = self._heads(self.query(normed))
        if isinstance(context, KeysValues):
            key, value = context
        elif context is None:
            key, value = self._keys_values(normed)
        else:
            key, value = self.keys_values(context)
        if remember is not None:
            key, value = remember(key, value)
        rows = query.shape[0] // key.shape[0]
        if rows > 1:  # as queries of one row, so that the keys need not be repeated
            query = query.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if rows > 1:
            mixed = mixed.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def keys_values(self, context: Float[Tensor, "batch keys width"]) -> KeysValues:
        """Compute keys and values as ``forward`` does, from another stream's or its own earlier tokens."""
        return self._keys_values(
            self.norm(context) if self.context_norm is None else self.context_norm(context)
        )

    def _keys_values(self, normed: Float[Tensor, "batch keys width"]) -> KeysValues:
        return KeysValues(*(self._heads(t) for t in self.key_value(normed).chunk(2, dim=-1)))

    def _heads(self, t: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch heads n channels"]:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLPSublayer(nn.Module):
    """Pre-LayerNorm MLP: what it adds to the residual stream."""

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, hidden), QuickGELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch n width"]:
        return self.layers(self.norm(tokens))
