"""Stage 2 of CLIPmapper: self- and cross-attention over the tokens of both CLIP towers.

The two variants of Huang et al. 2023 (arXiv 2308.10240): ``dual_flow`` (their type A) and ``single_flow``
(type B). Pre-LayerNorm, QuickGELU.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipmapper.models.attention import AttentionSublayer, MLPSublayer


class DualFlowBlock(nn.Module):
    """Per modality: self-attention, cross-attention, MLP.

    Cross-attention takes the stream's own tokens after its self-attention as queries, and the *other*
    stream's tokens as they entered the block as keys and values, so both directions run in parallel.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.image_self = AttentionSublayer(width, heads)
        self.text_self = AttentionSublayer(width, heads)
        self.image_cross = AttentionSublayer(width, heads, cross=True)
        self.text_cross = AttentionSublayer(width, heads, cross=True)
        self.image_mlp = MLPSublayer(width, mlp_ratio)
        self.text_mlp = MLPSublayer(width, mlp_ratio)

    def forward(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_mask: Bool[Tensor, "batch 1 1 image"] | None,
        text_mask: Bool[Tensor, "batch 1 1 text"] | None,
        only_class_token: bool = False,
    ) -> tuple[Float[Tensor, "batch queries width"], Float[Tensor, "batch text width"]]:
        """``only_class_token``: compute just image token 0 (all that a head reads of the last block)."""
        asking = image[:, :1] if only_class_token else image
        new_image = asking + self.image_self(asking, image if only_class_token else None, image_mask)
        new_image = new_image + self.image_cross(new_image, text, text_mask)
        new_image = new_image + self.image_mlp(new_image)
        if only_class_token:
            return new_image, text
        new_text = text + self.text_self(text, None, text_mask)
        new_text = new_text + self.text_cross(new_text, image, image_mask)
        new_text = new_text + self.text_mlp(new_text)
        return new_image, new_text


class SingleFlowBlock(nn.Module):
    """One self-attention over the concatenation [image; text], then an MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = AttentionSublayer(width, heads)
        self.mlp = MLPSublayer(width, mlp_ratio)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch 1 1 tokens"] | None,
        only_class_token: bool = False,
    ) -> Float[Tensor, "batch queries width"]:
        asking = tokens[:, :1] if only_class_token else tokens
        out = asking + self.attention(asking, tokens if only_class_token else None, mask)
        return out + self.mlp(out)


class Mapper(nn.Module):
    """What both variants share: projections to the mapper's width, class token, position embeddings.

    Parameters
    ----------
    image_width, text_width : widths of the encoder's tokens.
    grid : (rows, columns) of image patches.
    class_token : give the image a learned class token here, for towers without one (SigLIP).
    image_position_embedding : add a learned embedding of the place to every image token. The paper's mapper
        has none; it is an option because what a patch token of a small CLIP knows of its own place does not
        suffice to answer "left or right of".
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        grid: tuple[int, int],
        *,
        width: int = 512,
        depth: int = 3,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        image_position_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.project_image = nn.Linear(image_width, width, bias=False)
        self.project_text = nn.Linear(text_width, width, bias=False)
        scale = width**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(width)) if class_token else None
        places = 1 + grid[0] * grid[1]
        self.positions = (
            nn.Parameter(scale * torch.randn(places, width)) if image_position_embedding else None
        )
        self.blocks = nn.ModuleList(self._block(width, heads, mlp_ratio) for _ in range(depth))

    def _block(self, width: int, heads: int, mlp_ratio: float) -> nn.Module:
        raise NotImplementedError

    def embed(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch text text_width"],
        keep: Int[Tensor, "batch kept"] | None,
    ) -> tuple[Float[Tensor, "batch all_image width"], Float[Tensor, "batch text width"]]:
        """Both streams as they enter the first block, the image's class token first."""
        image, text = self.project_image(image_tokens), self.project_text(text_tokens)
        if self.class_token is not None:
            image = torch.cat([self.class_token.expand(image.shape[0], 1, -1), image], dim=1)
        if self.positions is not None:
            if keep is None:
                place = self.positions
            else:
                first = self.positions[:1].expand(keep.shape[0], 1, -1)
                place = torch.cat([first, self.positions[1 + keep]], dim=1)
            image = image + place
        return image, text

    def forward(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch text text_width"],
        *,
        keep: Int[Tensor, "batch kept"] | None = None,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        text_valid: Bool[Tensor, "batch text"] | None = None,
        only_class_token: bool = False,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        """Final tokens of both streams.

        ``keep``: which patches ``image_tokens`` holds, when some were removed. ``image_ignore``: True for
        patches that no attention may read. ``text_valid``: False for text tokens that no attention may
        read (padding, ignored words). ``only_class_token``: of the image return just the class token; the
        last block then leaves out what does not reach it.
        """
        image, text = self.embed(image_tokens, text_tokens, keep)
        image_valid = None
        if image_ignore is not None:
            prefix = image.shape[1] - image_ignore.shape[1]
            image_valid = torch.cat([image_ignore.new_ones(len(image), prefix), ~image_ignore], dim=1)
        return self.run(image, text, image_valid, text_valid, only_class_token)

    def run(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_valid: Bool[Tensor, "batch image"] | None,
        text_valid: Bool[Tensor, "batch text"] | None,
        only_class_token: bool,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        raise NotImplementedError


def _as_mask(valid: Bool[Tensor, "batch keys"] | None) -> Bool[Tensor, "batch 1 1 keys"] | None:
    return None if valid is None or bool(valid.all()) else valid[:, None, None, :]


class DualFlowMapper(Mapper):
    """Two streams that attend themselves and each other (type A; 3 blocks in the paper)."""

    def _block(self, width: int, heads: int, mlp_ratio: float) -> nn.Module:
        return DualFlowBlock(width, heads, mlp_ratio)

    def run(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_valid: Bool[Tensor, "batch image"] | None,
        text_valid: Bool[Tensor, "batch text"] | None,
        only_class_token: bool,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        image_mask, text_mask = _as_mask(image_valid), _as_mask(text_valid)
        for block in self.blocks:
            last = block is self.blocks[-1]
            image, text = block(image, text, image_mask, text_mask, only_class_token and last)
        return image, text


class SingleFlowMapper(Mapper):
    """One stream of all tokens (type B; 8 blocks in the paper)."""

    def _block(self, width: int, heads: int, mlp_ratio: float) -> nn.Module:
        return SingleFlowBlock(width, heads, mlp_ratio)

    def run(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_valid: Bool[Tensor, "batch image"] | None,
        text_valid: Bool[Tensor, "batch text"] | None,
        only_class_token: bool,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        size = image.shape[1]
        valid = None
        if image_valid is not None or text_valid is not None:
            everything = torch.ones(
                image.shape[0], size + text.shape[1], dtype=torch.bool, device=image.device
            )
            image_valid = everything[:, :size] if image_valid is None else image_valid
            text_valid = everything[:, size:] if text_valid is None else text_valid
            valid = torch.cat([image_valid, text_valid], dim=1)
        mask = _as_mask(valid)
        joint = torch.cat([image, text], dim=1)
        for block in self.blocks:
            last = block is self.blocks[-1]
            joint = block(joint, mask, only_class_token and last)
        if only_class_token:
            return joint[:, :1], text
        return joint[:, :size], joint[:, size:]


MAPPERS = {"dual_flow": DualFlowMapper, "single_flow": SingleFlowMapper}
