"""The blocks that the two mappers are stacks of, their two kinds of sub-layer, and what these leave out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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


class DualFlowBlock(nn.Module):
    """Per modality: self-attention, cross-attention, MLP.

    Cross-attention takes the stream's own tokens after its self-attention as queries, and the *other*
    stream's tokens as they entered the block as keys and values, so both directions run in parallel.
    For captioning the image has no cross-attention: it sees only itself.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, captioning: bool = False) -> None:
        super().__init__()
        self.image_self = AttentionSublayer(width, heads)
        self.text_self = AttentionSublayer(width, heads)
        self.image_cross = None if captioning else AttentionSublayer(width, heads, cross=True)
        self.text_cross = AttentionSublayer(width, heads, cross=True)
        self.image_mlp = MLPSublayer(width, mlp_ratio)
        self.text_mlp = MLPSublayer(width, mlp_ratio)

    def forward(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_mask: Bool[Tensor, "batch 1 1 image"] | None,
        text_mask: Bool[Tensor, "masks 1 readers text"] | None,
        only_class_token: bool = False,
        only_text: bool = False,
    ) -> tuple[Float[Tensor, "batch queries width"], Float[Tensor, "batch text width"]]:
        """``only_class_token``: compute just image token 0 (all that a head reads of the last block).

        ``only_text``: just the text; the image comes back as it was.
        """
        new_image = image
        if not only_text:
            asking = image[:, :1] if only_class_token else image
            new_image = asking + self.image_self(asking, image if only_class_token else None, image_mask)
            if self.image_cross is not None:
                new_image = new_image + self.image_cross(new_image, text, text_mask)
            new_image = new_image + self.image_mlp(new_image)
        if only_class_token:
            return new_image, text
        return new_image, self._new_text(text, image, image_mask, text_mask)

    def _new_text(
        self,
        text: Float[Tensor, "rows text width"],
        image: Float[Tensor, "batch image width"] | KeysValues,
        image_mask: Bool[Tensor, "batch 1 1 image"] | None,
        text_mask: Bool[Tensor, "..."] | None,
        remember: Remember | None = None,
    ) -> Float[Tensor, "rows text width"]:
        new_text = text + self.text_self(text, None, text_mask, remember)
        new_text = new_text + self.text_cross(new_text, image, image_mask)
        return new_text + self.text_mlp(new_text)

    def image_alone(self, image: Float[Tensor, "batch image width"]) -> Float[Tensor, "batch image width"]:
        """The image of a captioning block, which needs no text for it."""
        image = image + self.image_self(image)
        return image + self.image_mlp(image)

    def image_keys_values(self, image: Float[Tensor, "batch image width"]) -> KeysValues:
        """Compute the keys and values that words read of the image as it entered the block."""
        return self.text_cross.keys_values(image)

    def text_step(
        self,
        text: Float[Tensor, "rows text width"],
        image: KeysValues,
        past: int,
        remember: Remember,
    ) -> Float[Tensor, "rows text width"]:
        """New words of a caption; ``remember`` holds the keys and values of the ``past`` ones before."""
        mask = step_mask(text.shape[1], past, text.device)
        return self._new_text(text, image, None, mask, remember)


class SingleFlowBlock(nn.Module):
    """One self-attention over the concatenation [image; text], then an MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = AttentionSublayer(width, heads)
        self.mlp = MLPSublayer(width, mlp_ratio)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "masks 1 readers tokens"] | None = None,
        only: slice | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """``only``: compute just these tokens (all that is read of the last block)."""
        asking = tokens if only is None else tokens[:, only]
        out = asking + self.attention(asking, None if only is None else tokens, mask)
        return out + self.mlp(out)

    def image_alone(self, image: Float[Tensor, "batch image width"]) -> Float[Tensor, "batch image width"]:
        """The image of a captioning block, which needs no text for it."""
        return self(image)

    def image_keys_values(self, image: Float[Tensor, "batch image width"]) -> KeysValues:
        """Compute the keys and values that words read of the image as it entered the block."""
        return self.attention.keys_values(image)

    def text_step(
        self,
        text: Float[Tensor, "rows text width"],
        image: KeysValues,
        past: int,
        remember: Remember,
    ) -> Float[Tensor, "rows text width"]:
        """New words of a caption; ``remember`` holds the keys and values of the ``past`` ones before."""

        def behind_image(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            captions = key.shape[0] // image.key.shape[0]
            both = zip(image, remember(key, value), strict=True)
            key, value = (torch.cat([i.repeat_interleave(captions, 0), t], dim=2) for i, t in both)
            return key, value

        mask = step_mask(text.shape[1], image.key.shape[2] + past, text.device)
        new_text = text + self.attention(text, None, mask, behind_image)
        return new_text + self.mlp(new_text)
