"""The blocks that the two mappers are stacks of."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clipmapper.models.attention import AttentionSublayer, KeysValues, MLPSublayer, Remember
from clipmapper.models.masking import step_mask


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
