"""Token sequences of the image towers that ``open_clip`` builds, without changing or copying them.

Each class drives the tower's own modules step by step, so that patches can be masked out of every
attention or removed before the first one, and the final tokens are at hand before they are pooled.
"""

from collections.abc import Sequence

import timm.models.vision_transformer as timm_vit
import torch
from jaxtyping import Bool, Float, Int
from open_clip.timm_model import TimmModel
from open_clip.transformer import CustomResidualAttentionBlock, VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.models.mapper_blocks import ignored_keys_mask, select_tokens


class ImageTower(nn.Module):
    """Base class of image towers: what the encoder needs from one.

    ``grid`` is (rows, columns) of patches, ``prefix_tokens`` how many tokens come before the patches (the
    class token and, in some towers, registers), ``width`` that of the final tokens.
    """

    grid: tuple[int, int]
    prefix_tokens: int
    width: int

    def attention_blocks(self) -> Sequence[nn.Module]:
        """The blocks in order, one attention sub-layer each."""
        raise NotImplementedError

    def embed(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "patches rotary"] | None]:
        """Prefix tokens and patches as they enter the first block.

        Also the sines and cosines of every patch's place, for towers that rotate queries and keys by it.
        """
        raise NotImplementedError

    def blocks(
        self,
        tokens: Float[Tensor, "batch tokens channels"],
        mask: Float[Tensor, "..."] | None,
        rotary: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """All blocks.

        ``mask`` is added to the attention scores, in the shape that ``mask_for`` gives. ``rotary``: as from
        ``embed``, or with the rows of the patches that stay, [batch, 1, kept, rotary].
        """
        raise NotImplementedError

    def mask_for(self, ignored: Bool[Tensor, "batch tokens"], dtype: torch.dtype) -> Float[Tensor, "..."]:
        raise NotImplementedError

    def finish(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """The final LayerNorm, where the tower applies it token by token."""
        raise NotImplementedError

    def pool(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch embedding"]:
        """The tower's own pooled and projected feature, from what ``forward`` returned."""
        raise NotImplementedError

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keep: Int[Tensor, "batch kept"] | None = None,
        ignore: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Final tokens, prefix tokens first.

        ``keep``: indices of the patches that stay, equally many in every image; the others are removed
        before the first block. ``ignore``: True for patches that no attention may read; they stay in the
        sequence. Either leaves the remaining tokens as if the other patches had never been there.
        """
        return self.behind(*self.embed(images), keep=keep, ignore=ignore)

    def behind(
        self,
        tokens: Float[Tensor, "batch tokens channels"],
        rotary: Float[Tensor, "patches rotary"] | None,
        keep: Int[Tensor, "batch kept"] | None = None,
        ignore: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "batch out channels"]:
        """``forward`` behind ``embed``, which many variants of an image share."""
        prefix = self.prefix_tokens
        if keep is not None:
            tokens = torch.cat([tokens[:, :prefix], select_tokens(tokens[:, prefix:], keep)], dim=1)
            rotary = None if rotary is None else rotary[keep][:, None]
        mask = None
        if ignore is not None:
            ignore = ignore if keep is None else ignore.gather(1, keep)
            always = ignore.new_zeros(ignore.shape[0], prefix)
            mask = self.mask_for(torch.cat([always, ignore], dim=1), tokens.dtype)
        return self.finish(self.blocks(tokens, mask, rotary))


class OpenClipImageTower(ImageTower):
    """open_clip's own ``VisionTransformer`` (OpenAI, LAION, DataComp, CLIPA, CoCa weights, ...)."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        if isinstance(visual.transformer.resblocks[0], CustomResidualAttentionBlock):
            raise UserError(
                "encoder.architecture: it has open_clip's custom attention blocks in its image tower, which "
                "are not supported; use one with standard blocks, e.g. ViT-B-32"
            )
        self.visual = visual
        self.grid = tuple(visual.grid_size)
        self.prefix_tokens = 1
        self.width = visual.conv1.out_channels
        self._heads = visual.transformer.resblocks[0].attn.num_heads
        # CLIPA normalises after pooling and CoCa pools by attention before it normalises: there the tokens
        # are the last block's output, since the tower has no final LayerNorm over tokens.
        self.norm_per_token = visual.attn_pool is None and not visual.final_ln_after_pool

    def attention_blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def embed(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], None]:
        return self.visual._embeds(images), None

    def blocks(
        self,
        tokens: Float[Tensor, "batch tokens channels"],
        mask: Float[Tensor, "..."] | None,
        rotary: None,
    ) -> Float[Tensor, "batch tokens channels"]:
        return self.visual.transformer(tokens, attn_mask=mask)

    def mask_for(self, ignored: Bool[Tensor, "batch tokens"], dtype: torch.dtype) -> Float[Tensor, "..."]:
        return ignored_keys_mask(ignored, dtype).repeat_interleave(self._heads, dim=0)

    def finish(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        return self.visual.ln_post(tokens) if self.norm_per_token else tokens

    def pool(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch embedding"]:
        if self.norm_per_token:
            pooled, _ = self.visual._global_pool(tokens)
        else:
            pooled, _ = self.visual._pool(tokens)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class TimmImageTower(ImageTower):
    """A ``timm`` vision transformer inside open_clip's ``TimmModel`` (SigLIP, SigLIP 2, ...).

    SigLIP has no class token (``prefix_tokens`` 0): its pooled feature comes from an attention pooling
    head, which belongs to the pooled feature and not to the token sequence.
    """

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual
        trunk = visual.trunk
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.prefix_tokens = trunk.num_prefix_tokens
        self.width = trunk.embed_dim

    def attention_blocks(self) -> Sequence[nn.Module]:
        return list(self.visual.trunk.blocks)

    def embed(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "patches rotary"] | None]:
        trunk = self.visual.trunk
        return trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images))), None

    def blocks(
        self,
        tokens: Float[Tensor, "batch tokens channels"],
        mask: Float[Tensor, "..."] | None,
        rotary: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "batch tokens channels"]:
        rotated = {} if rotary is None else {"rope": rotary}
        for block in self.visual.trunk.blocks:
            tokens = block(tokens, attn_mask=mask, **rotated)
        return tokens

    def mask_for(self, ignored: Bool[Tensor, "batch tokens"], dtype: torch.dtype) -> Float[Tensor, "..."]:
        return ignored_keys_mask(ignored, dtype)[:, None]

    def finish(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        return self.visual.trunk.norm(tokens)

    def pool(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch embedding"]:
        return self.visual.head(self.visual.trunk.forward_head(tokens))


class EvaImageTower(TimmImageTower):
    """A ``timm`` EVA transformer (EVA-CLIP, Perception Encoder): places also rotate queries and keys."""

    def embed(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "patches rotary"] | None]:
        trunk = self.visual.trunk
        tokens, rotary = trunk._pos_embed(trunk.patch_embed(images))
        return trunk.norm_pre(tokens), rotary


def image_tower(visual: nn.Module, architecture: str) -> ImageTower:
    """The image tower that fits ``visual``.

    Raises ``UserError`` for a tower without a sequence of patch tokens, with the kinds that work.
    """
    if isinstance(visual, VisionTransformer):
        return OpenClipImageTower(visual)
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, timm_vit.VisionTransformer) and hasattr(trunk.patch_embed, "grid_size"):
        return TimmImageTower(visual)
    # With "mixed" rotary positions every block rotates differently; no CLIP of open_clip has them.
    if isinstance(trunk, Eva) and not trunk.rope_mixed:
        return EvaImageTower(visual)
    kind = type(visual if trunk is None else trunk).__name__
    raise UserError(
        f"encoder.architecture={architecture}: its image tower is a {kind}, which gives no sequence of patch "
        "tokens that attention reads; use one with a vision transformer: open_clip's own (ViT-B-32, "
        "ViT-B-16-quickgelu, ViT-L-14-336, coca_ViT-B-32, ...) or timm's (ViT-B-16-SigLIP, EVA02-B-16, ...)"
    )
