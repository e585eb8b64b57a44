"""Token sequences of the text towers that ``open_clip`` builds, without changing or copying them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.model import CLIP
from open_clip.transformer import CustomResidualAttentionBlock, TextTransformer, text_global_pool
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.models.mapper_blocks import Remember, ignored_keys_mask, select_tokens, step_mask


class TextTower(nn.Module):
    """open_clip's text transformer, be it a module of its own or unpacked into ``CLIP``.

    Final tokens are those after the final LayerNorm, one for each token id; CoCa's appended class token,
    where there is one, always comes last and is part of the sequence.
    """

    def __init__(self, clip: nn.Module, architecture: str) -> None:
        super().__init__()
        owner = getattr(clip, "text", clip)
        if not isinstance(owner, CLIP | TextTransformer):
            raise UserError(
                f"encoder.architecture={architecture}: its text tower is a {type(owner).__name__}; use an "
                "architecture whose text tower is open_clip's own text transformer (ViT-B-32, ...)"
            )
        if isinstance(owner.transformer.resblocks[0], CustomResidualAttentionBlock):
            raise UserError(
                f"encoder.architecture={architecture}: it has open_clip's custom attention blocks in its "
                "text tower, which are not supported; use one with standard blocks, e.g. ViT-B-32"
            )
        self.owner = owner
        self.width = owner.ln_final.weight.shape[0]
        self.heads = owner.transformer.resblocks[0].attn.num_heads
        self.causal = owner.attn_mask is not None
        self.appended_class_token = getattr(owner, "cls_emb", None) is not None
        # Only a plain causal tower gives the same tokens when padding behind the text is cut off: SigLIP's
        # words read the padding, and CoCa's class token comes behind it.
        self.padding_matters = not self.causal or self.appended_class_token

    def attention_blocks(self) -> Sequence[nn.Module]:
        """The blocks in order, one attention sub-layer each."""
        return list(self.owner.transformer.resblocks)

    def embed(
        self, ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch embedded width"], Float[Tensor, "..."] | None]:
        """Embedded tokens with their positions, and the tower's own mask (added to attention scores)."""
        owner = self.owner
        if self.padding_matters and isinstance(owner, TextTransformer):
            return owner._embeds(ids)
        length, mask = ids.shape[1], owner.attn_mask
        return self.embed_words(ids), None if mask is None else mask[:length, :length]

    def embed_words(
        self, ids: Int[Tensor, "batch tokens"], past: int = 0
    ) -> Float[Tensor, "batch tokens width"]:
        """Embedded tokens with their positions, which come behind ``past`` other tokens."""
        dtype = self.owner.transformer.get_cast_dtype()
        positions = self.owner.positional_embedding[past : past + ids.shape[1]]
        return self.owner.token_embedding(ids).to(dtype) + positions.to(dtype)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        keep: Int[Tensor, "batch kept"] | None = None,
        ignore: Bool[Tensor, "batch tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch out width"]:
        """Final tokens, behind them the appended class token where there is one.

        ``keep``: ascending indices of the tokens that stay, padded behind with -1 (what stands there in the
        result means nothing); the others are removed before the first block. ``ignore``: True for tokens
        that no attention may read; they stay in the sequence. Either way the remaining tokens come out as
        if the others had never been there; positions stay those of the whole text. ``valid`` (False at
        padding) is needed with ``keep`` by towers whose words read the padding.
        """
        if keep is not None and self.padding_matters:
            # Padding and the appended class token must stay, so the removed tokens are ignored instead.
            if valid is None:
                raise ValueError("this text tower reads its padding: removing tokens needs `valid`")
            kept = torch.zeros_like(valid).scatter_reduce(1, keep.clamp(min=0), keep >= 0, "amax")
            removed = valid & ~kept
            tokens = self.forward(ids, ignore=removed if ignore is None else removed | ignore)
            kept_tokens = select_tokens(tokens, keep)
            if self.appended_class_token:
                return torch.cat([kept_tokens, tokens[:, -1:]], dim=1)
            return kept_tokens
        embedded, mask = self.embed(ids)
        if keep is not None:
            embedded = select_tokens(embedded, keep)
            mask = None if mask is None else mask[: keep.shape[1], : keep.shape[1]]
        if ignore is not None:
            ignore = ignore if keep is None else ignore.gather(1, keep.clamp(min=0))
            if self.appended_class_token:
                ignore = torch.cat([ignore, ignore.new_zeros(ignore.shape[0], 1)], dim=1)
            ignored = ignored_keys_mask(ignore, embedded.dtype).repeat_interleave(self.heads, dim=0)
            mask = ignored if mask is None else mask + ignored
        return self.owner.ln_final(self.owner.transformer(embedded, attn_mask=mask))

    def step(
        self, ids: Int[Tensor, "batch new"], past: int, remember: Sequence[Remember]
    ) -> Float[Tensor, "batch new width"]:
        """Final tokens of ``ids`` behind ``past`` others, of a causal tower: ``forward``, a word at a time.

        ``remember``: one for each block, holding its keys and values of the tokens before. The weights are
        those of open_clip's blocks; their own forward has no place for earlier keys.
        """
        tokens = self.embed_words(ids, past)
        mask = step_mask(ids.shape[1], past, ids.device)
        for block, earlier in zip(self.attention_blocks(), remember, strict=True):
            attention = block.attn
            projected = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
            query, key, value = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
            )
            key, value = earlier(key, value)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            tokens = tokens + block.ls_1(attention.out_proj(mixed.transpose(1, 2).flatten(2)))
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return self.owner.ln_final(tokens)

    def pool(
        self, tokens: Float[Tensor, "batch out width"], ids: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch embedding"]:
        """The tower's own pooled and projected feature, from what ``forward`` returned for whole texts.

        Raises ``ValueError`` when the tower pools the last token of the context and the context was cut.
        """
        owner = self.owner
        if self.appended_class_token:
            pooled = tokens[:, -1]
        else:
            kind = owner.text_pool_type if isinstance(owner, CLIP) else owner.pool_type
            if kind == "last" and tokens.shape[1] < owner.context_length:
                raise ValueError(
                    f"this text tower pools token {owner.context_length} of its context, but only "
                    f"{tokens.shape[1]} are given: tokenize with whole_context=True"
                )
            eos = owner.text_eos_id if isinstance(owner, CLIP) else owner.eos_id
            pooled = text_global_pool(tokens, ids, pool_type=kind, eos_token_id=eos)
        if owner.text_projection is None:
            return pooled
        if isinstance(owner.text_projection, nn.Linear):
            return owner.text_projection(pooled)
        return pooled @ owner.text_projection
