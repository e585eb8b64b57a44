"""The two kinds of sub-layer that the mapper is made of."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


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

    def forward(
        self,
        tokens: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys width"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """``context`` None: ``tokens`` attend themselves. ``mask``: True where a query may read a key."""
        normed = self.norm(tokens)
        if context is None:
            source = normed
        else:
            source = self.norm(context) if self.context_norm is None else self.context_norm(context)
        query = self._heads(self.query(normed))
        key, value = (self._heads(t) for t in self.key_value(source).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))

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
