"""Stage 2 of CLIPmapper: self- and cross-attention over the tokens of both CLIP towers.

The two variants of Huang et al. 2023 (arXiv 2308.10240): ``dual_flow`` (their type A) and ``single_flow``
(type B). Pre-LayerNorm, QuickGELU.

For captioning the text is causal and the image is blind to it, so that the image's side of a mapper can be
computed once for all words (``image_memory``) and a word at a time can follow (``text_step``).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipmapper.models.mapper_blocks import DualFlowBlock, KeysValues, Remember, SingleFlowBlock, causal_mask

# Standard deviation of new position embeddings: about half of a projected token's, so that places are told
# apart from the first step.
_POSITION_SCALE = 0.25


class Mapper(nn.Module):
    """Base class of both variants: projections to the mapper's width, class token, position embeddings.

    Parameters
    ----------
    image_width, text_width : widths of the encoder's tokens.
    grid : (rows, columns) of image patches.
    class_token : give the image a learned class token here, for towers without one (SigLIP).
    image_position_embedding : add a learned embedding of the place to every image token. The paper's mapper
        has none; it is an option because what a patch token of a small CLIP knows of its own place does not
        suffice to answer "left or right of".
    captioning : no word reads a later one, and the image reads no word. (For answering questions both
        streams read all of each other.)
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
        captioning: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.captioning = captioning
        self.project_image = nn.Linear(image_width, width, bias=False)
        self.project_text = nn.Linear(text_width, width, bias=False)
        scale = width**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(width)) if class_token else None
        places = 1 + grid[0] * grid[1]
        self.positions = (
            nn.Parameter(_POSITION_SCALE * torch.randn(places, width)) if image_position_embedding else None
        )
        self.blocks = nn.ModuleList(self._block(width, heads, mlp_ratio) for _ in range(depth))

    def _block(self, width: int, heads: int, mlp_ratio: float) -> nn.Module:
        raise NotImplementedError

    def embed_image(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        keep: Int[Tensor, "batch kept"] | None,
    ) -> Float[Tensor, "batch all_image width"]:
        """The image as it enters the first block, its class token first."""
        image = self.project_image(image_tokens)
        if self.class_token is not None:
            image = torch.cat([self.class_token.expand(image.shape[0], 1, -1), image], dim=1)
        if self.positions is not None:
            if keep is None:
                place = self.positions
            else:
                first = self.positions[:1].expand(keep.shape[0], 1, -1)
                place = torch.cat([first, self.positions[1 + keep]], dim=1)
            image = image + place
        return image

    def forward(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch text text_width"],
        *,
        keep: Int[Tensor, "batch kept"] | None = None,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        text_valid: Bool[Tensor, "batch text"] | None = None,
        only_class_token: bool = False,
        only_text: bool = False,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        """Final tokens of both streams.

        ``keep``: which patches ``image_tokens`` holds, when some were removed. ``image_ignore``: True for
        patches that no attention may read. ``text_valid``: False for text tokens that no attention may
        read (padding, ignored words). ``only_class_token``: of the image return just the class token; the
        last block then leaves out what does not reach it. ``only_text`` (captioning): the last block leaves
        out the image, which comes back as it entered that block.
        """
        image, text = self.embed_image(image_tokens, keep), self.project_text(text_tokens)
        image_valid = None
        if image_ignore is not None:
            prefix = image.shape[1] - image_ignore.shape[1]
            image_valid = torch.cat([image_ignore.new_ones(len(image), prefix), ~image_ignore], dim=1)
        return self.run(image, text, image_valid, text_valid, only_class_token, only_text)

    def image_memory(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        keep: Int[Tensor, "batch kept"] | None = None,
    ) -> list[KeysValues]:
        """All that words read of the image, block by block, for :meth:`text_step` (captioning only)."""
        return self.image_side(image_tokens, keep, whole=False)[0]

    def image_side(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        keep: Int[Tensor, "batch kept"] | None = None,
        *,
        whole: bool = True,
    ) -> tuple[list[KeysValues], Float[Tensor, "batch all_image width"]]:
        """:meth:`image_memory`, and the image's final tokens.

        Not ``whole``: as they enter the last block, of which no word reads more.
        """
        if not self.captioning:
            raise ValueError("the image of this mapper reads the text; build it with captioning=True")
        image = self.embed_image(image_tokens, keep)
        memory = []
        for block in self.blocks:
            memory.append(block.image_keys_values(image))
            if whole or block is not self.blocks[-1]:
                image = block.image_alone(image)
        return memory, image

    def text_step(
        self,
        text_tokens: Float[Tensor, "rows text text_width"],
        memory: Sequence[KeysValues],
        past: int,
        remember: Sequence[Remember],
    ) -> Float[Tensor, "rows text width"]:
        """Final tokens of new words that come behind ``past`` others.

        ``memory``: of :meth:`image_memory`, for as many images, or for every so many rows one image.
        ``remember``: one for each block, holding its keys and values of the words before.
        """
        text = self.project_text(text_tokens)
        for block, image, earlier in zip(self.blocks, memory, remember, strict=True):
            text = block.text_step(text, image, past, earlier)
        return text

    def run(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_valid: Bool[Tensor, "batch image"] | None,
        text_valid: Bool[Tensor, "batch text"] | None,
        only_class_token: bool,
        only_text: bool,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        raise NotImplementedError


def _as_mask(valid: Bool[Tensor, "batch keys"] | None) -> Bool[Tensor, "batch 1 1 keys"] | None:
    return None if valid is None or bool(valid.all()) else valid[:, None, None, :]


class DualFlowMapper(Mapper):
    """Two streams that attend themselves and each other (type A; 3 blocks in the paper)."""

    def _block(self, width: int, heads: int, mlp_ratio: float) -> nn.Module:
        return DualFlowBlock(width, heads, mlp_ratio, self.captioning)

    def run(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        image_valid: Bool[Tensor, "batch image"] | None,
        text_valid: Bool[Tensor, "batch text"] | None,
        only_class_token: bool,
        only_text: bool,
    ) -> tuple[Float[Tensor, "batch out_image width"], Float[Tensor, "batch text width"]]:
        image_mask, text_mask = _as_mask(image_valid), _as_mask(text_valid)
        if self.captioning:
            causal = causal_mask(text.shape[1], text.shape[1], text.device)
            text_mask = causal if text_mask is None else causal & text_mask
        for block in self.blocks:
            last = block is self.blocks[-1]
            image, text = block(
                image, text, image_mask, text_mask, only_class_token and last, only_text and last
            )
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
        only_text: bool,
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
        if self.captioning:
            causal = causal_mask(joint.shape[1], joint.shape[1], joint.device)
            causal[..., :size, :size] = True
            mask = causal if mask is None else causal & mask
        for block in self.blocks[:-1]:
            joint = block(joint, mask)
        last, only = self.blocks[-1], None
        if only_class_token:
            only = slice(1)
        elif only_text:
            only = slice(size, None)
        if only is not None and self.captioning:
            mask = mask[..., only, :]
        out = last(joint, mask, only)
        if only_class_token:
            return out, text
        if only_text:
            return joint[:, :size], out
        return out[:, :size], out[:, size:]


MAPPERS = {"dual_flow": DualFlowMapper, "single_flow": SingleFlowMapper}
