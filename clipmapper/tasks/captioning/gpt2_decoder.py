"""A language model that reads the mapper's tokens: GPT-2 as second decoder, and the captioner with it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import Mapper
from clipmapper.models.mapper_blocks import KeysValues, Remember, causal_mask, step_mask
from clipmapper.tasks.captioning.gpt2 import CROSS_ATTENTION, OwnTokenizer
from clipmapper.tasks.captioning.head import CaptionEnds, GPT2Head
from clipmapper.tasks.captioning.model import Captioner

DECODERS = ("gpt2_prefix", "gpt2_cross")


class GPT2Decoder(nn.Module):
    """GPT-2 behind a mapper (not in the paper, which has no language model).

    GPT-2's word embeddings go in with the mapper's token of the same word added to each (LayerNorm and a
    linear map, which is 0 at first: a pretrained GPT-2 begins as it was). The mapper's image tokens go in

    - ``cross`` False: before the words, as a prefix that every word reads and that reads itself as GPT-2
      reads a text, from left to right (after ClipCap, Mokady et al. 2021, arXiv 2111.09734, whose prefix is
      all that GPT-2 is given);
    - ``cross`` True: through cross-attention in every block.

    Parameters
    ----------
    width : of the mapper's tokens.
    image_length : how many image tokens there are when none has been removed.
    frozen : GPT-2's own weights take no gradient and its dropout is off; cross-attention is new and trains.
    """

    def __init__(
        self, language_model: GPT2LMHeadModel, width: int, image_length: int, *, cross: bool, frozen: bool
    ) -> None:
        super().__init__()
        inner = language_model.config.n_embd
        self.language_model = language_model
        self.cross, self.frozen, self.image_length = cross, frozen, image_length
        self.image_norm, self.read_image = nn.LayerNorm(width), nn.Linear(width, inner)
        self.text_norm, self.read_text = nn.LayerNorm(width), nn.Linear(width, inner)
        nn.init.zeros_(self.read_text.weight)
        nn.init.zeros_(self.read_text.bias)
        if frozen:
            for name, weight in language_model.named_parameters():
                weight.requires_grad_(any(f".{part}." in name for part in CROSS_ATTENTION))

    @property
    def gpt2(self) -> nn.Module:
        return self.language_model.transformer

    @property
    def width(self) -> int:
        return self.gpt2.embed_dim

    @property
    def room(self) -> int:
        """How many tokens of a caption GPT-2 has positions for."""
        return self.language_model.config.n_positions - (0 if self.cross else self.image_length)

    def train(self, mode: bool = True) -> "GPT2Decoder":
        super().train(mode)
        if self.frozen:
            self.language_model.eval()
        return self

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens inner"]:
        """GPT-2's embeddings of words, without positions."""
        return self.gpt2.wte(ids)

    def positions(self, past: int, count: int) -> Float[Tensor, "count inner"]:
        """GPT-2's embeddings of the places of ``count`` words behind ``past`` others."""
        first = past + (0 if self.cross else self.image_length)
        return self.gpt2.wpe.weight[first : first + count]

    def forward(
        self,
        image: Float[Tensor, "batch image width"],
        text: Float[Tensor, "batch text width"],
        words: Float[Tensor, "batch text inner"],
        *,
        image_valid: Bool[Tensor, "batch image"] | None = None,
        text_valid: Bool[Tensor, "batch text"] | None = None,
        keep: Int[Tensor, "batch kept"] | None = None,
    ) -> Float[Tensor, "batch text inner"]:
        """Final states of the words, of which :class:`GPT2Head` makes scores.

        ``image``, ``text``: the mapper's final tokens; ``words``: of :meth:`embed`. ``image_valid``,
        ``text_valid``: False for tokens that no attention may read. ``keep``: which patches ``image`` holds
        behind its prefix tokens, when some were removed; the others keep their positions.
        """
        seen, said = self._seen(image), words + self.read_text(self.text_norm(text))
        first = 0 if self.cross else self.image_length
        places = torch.arange(first, first + text.shape[1], device=text.device).expand(len(text), -1)
        if self.cross:
            more = {"encoder_hidden_states": seen, "encoder_attention_mask": _mask(image_valid)}
            mask = _mask(text_valid)
        else:
            said = torch.cat([seen, said], dim=1)
            places = torch.cat([self._image_places(image, keep), places], dim=1)
            parts = ((image, image_valid), (text, text_valid))
            valid = [t.new_ones(t.shape[:2], dtype=torch.bool) if v is None else v for t, v in parts]
            mask, more = torch.cat(valid, dim=1), {}
            # Without a mask transformers takes a gap in the positions, where a patch is missing, for the
            # border between two texts.
            mask = _mask(mask) if keep is None else mask.long()
        out = self.gpt2(
            inputs_embeds=said, position_ids=places, attention_mask=mask, use_cache=False, **more
        ).last_hidden_state
        return out[:, -text.shape[1] :]

    def _seen(self, image: Float[Tensor, "batch image width"]) -> Float[Tensor, "batch image inner"]:
        return self.read_image(self.image_norm(image))

    def _image_places(self, image: Tensor, keep: Tensor | None) -> Int[Tensor, "batch image"]:
        if keep is None:
            return torch.arange(image.shape[1], device=image.device).expand(len(image), -1)
        before = image.shape[1] - keep.shape[1]
        first = torch.arange(before, device=image.device).expand(len(image), -1)
        return torch.cat([first, before + keep.clamp(min=0)], dim=1)

    def image_memory(
        self, image: Float[Tensor, "batch image width"], keep: Int[Tensor, "batch kept"] | None = None
    ) -> list[KeysValues]:
        """All that words read of the image, block by block, for :meth:`step`."""
        seen, memory = self._seen(image), []
        if self.cross:
            for block in self.gpt2.h:
                attention = block.crossattention
                memory.append(
                    KeysValues(*(_heads(attention, t) for t in attention.c_attn(seen).chunk(2, -1)))
                )
            return memory
        tokens = seen + self.gpt2.wpe(self._image_places(image, keep))
        mask = causal_mask(tokens.shape[1], tokens.shape[1], tokens.device)
        for number, block in enumerate(self.gpt2.h):
            query, key, value = _query_key_value(block, tokens)
            memory.append(KeysValues(key, value))
            if number + 1 < len(self.gpt2.h):
                tokens = tokens + self._attended(number, block.attn, query, key, value, mask)
                tokens = tokens + block.mlp(block.ln_2(tokens))
        return memory

    def step(
        self,
        text: Float[Tensor, "rows new width"],
        words: Float[Tensor, "rows new inner"],
        memory: Sequence[KeysValues],
        past: int,
        remember: Sequence[Remember],
    ) -> Float[Tensor, "rows new inner"]:
        """Final states of new words behind ``past`` others: ``forward``, a word at a time.

        ``memory``: of :meth:`image_memory`, for as many images, or for every so many rows one image.
        ``remember``: one for each block, holding its keys and values of the words before. The weights are
        those of GPT-2's blocks; ``transformers``' own cache has no room for what rows of an image share.
        """
        new = text.shape[1]
        tokens = words + self.read_text(self.text_norm(text)) + self.positions(past, new)
        mask = step_mask(new, past, text.device)
        if mask is not None and not self.cross:
            mask = F.pad(mask, (memory[0].key.shape[2], 0), value=True)
        for number, (block, image, earlier) in enumerate(zip(self.gpt2.h, memory, remember, strict=True)):
            image = KeysValues(*(t.repeat_interleave(len(text) // len(t), dim=0) for t in image))
            query, key, value = _query_key_value(block, tokens)
            key, value = earlier(key, value)
            if not self.cross:
                key, value = torch.cat([image.key, key], dim=2), torch.cat([image.value, value], dim=2)
            tokens = tokens + self._attended(number, block.attn, query, key, value, mask)
            if self.cross:
                attention = block.crossattention
                query = _heads(attention, attention.q_attn(block.ln_cross_attn(tokens)))
                tokens = tokens + self._attended(number, attention, query, *image, None)
            tokens = tokens + block.mlp(block.ln_2(tokens))
        return self.gpt2.ln_f(tokens)

    def _attended(
        self,
        number: int,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Float[Tensor, "rows new inner"]:
        """Compute what an attention sub-layer adds to the residual stream."""
        config = self.language_model.config
        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= number + 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return attention.resid_dropout(attention.c_proj(mixed.transpose(1, 2).flatten(2)))


def _mask(valid: Bool[Tensor, "batch tokens"] | None) -> Int[Tensor, "batch tokens"] | None:
    """As ``transformers`` wants it; None where there is nothing to hide."""
    return None if valid is None or bool(valid.all()) else valid.long()


def _query_key_value(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attn
    return tuple(_heads(attention, t) for t in attention.c_attn(block.ln_1(tokens)).chunk(3, dim=-1))


def _heads(attention: nn.Module, t: Float[Tensor, "rows n inner"]) -> Float[Tensor, "rows heads n channels"]:
    return t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


class GPT2Captioner(Captioner):
    """Encoder, causal mapper, and GPT-2, which reads the mapper's tokens (see :class:`GPT2Decoder`).

    Parameters
    ----------
    tokenizer : GPT-2's own, for one from a local folder; None: captions are in the encoder's tokens.

    ``text_embedding_only`` as of :class:`Captioner`; with GPT-2's own tokenizer it must be true, since CLIP's
    text tower knows other tokens, and the mapper then reads GPT-2's embeddings of words and their places.
    ``text_tokens`` holds, in its last channels, the words' embeddings as GPT-2 reads them.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        mapper: Mapper,
        decoder: GPT2Decoder,
        head: GPT2Head,
        *,
        tokenizer: OwnTokenizer | None = None,
        ends: CaptionEnds | None = None,
        text_embedding_only: bool = False,
    ) -> None:
        if tokenizer is not None and not text_embedding_only:
            raise UserError(
                "model.gpt2.path: GPT-2's own tokens are not those of CLIP's text tower, so captions cannot "
                "pass it; use model.text_embedding_only=true"
            )
        super().__init__(encoder, mapper, head, ends=ends, text_embedding_only=text_embedding_only)
        self.decoder = decoder
        self._own_tokenizer = tokenizer

    @property
    def tokenizer(self):
        return self.encoder.tokenizer if self._own_tokenizer is None else self._own_tokenizer

    @property
    def longest(self) -> int:
        return min(self.encoder.context_length, self.decoder.room) - 1

    def text_tokens(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"],
        ignore: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens text_width_and_inner"]:
        words = self.decoder.embed(ids)
        if self._own_tokenizer is None:
            read = super().text_tokens(ids, valid, ignore)
        else:
            read = words + self.decoder.positions(0, ids.shape[1])
        return torch.cat([read, words], dim=-1)

    def text_tokens_step(
        self, ids: Int[Tensor, "rows new"], past: int, remember: Sequence[Remember]
    ) -> Float[Tensor, "rows new text_width_and_inner"]:
        words = self.decoder.embed(ids)
        if self._own_tokenizer is None:
            read = super().text_tokens_step(ids, past, remember)
        else:
            read = words + self.decoder.positions(past, ids.shape[1])
        return torch.cat([read, words], dim=-1)

    def whole_caption_states(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch tokens text_width_and_inner"],
        valid: Bool[Tensor, "batch tokens"],
        *,
        keep: Int[Tensor, "batch kept"] | None,
        image_ignore: Bool[Tensor, "batch patches"] | None,
        only_text: bool,
    ) -> Float[Tensor, "batch tokens inner"]:
        """GPT-2 reads the image's final tokens, so the mapper computes them whatever ``only_text`` says."""
        read, words = self._parts(text_tokens)
        image, text = self.mapper(image_tokens, read, keep=keep, image_ignore=image_ignore, text_valid=valid)
        image_valid = None
        if image_ignore is not None:
            prefix = image_ignore.new_ones(len(image), image.shape[1] - image_ignore.shape[1])
            image_valid = torch.cat([prefix, ~image_ignore], dim=1)
        return self.decoder(image, text, words, image_valid=image_valid, text_valid=valid, keep=keep)

    read_from = "GPT-2"

    def scores(self, state: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows vocabulary"]:
        return self.head(self.decoder.gpt2.ln_f(state))

    def image_memory(
        self,
        image_tokens: Float[Tensor, "images image image_width"],
        keep: Int[Tensor, "images kept"] | None = None,
    ) -> list[KeysValues]:
        memory, image = self.mapper.image_side(image_tokens, keep)
        return [*memory, *self.decoder.image_memory(image, keep)]

    @property
    def caches(self) -> int:
        return super().caches + len(self.decoder.gpt2.h)

    def word_states(
        self,
        text_tokens: Float[Tensor, "rows new text_width_and_inner"],
        memory: Sequence[KeysValues],
        past: int,
        remember: Sequence[Remember],
    ) -> Float[Tensor, "rows new inner"]:
        read, words = self._parts(text_tokens)
        blocks = len(self.mapper.blocks)
        text = self.mapper.text_step(read, memory[:blocks], past, remember[:blocks])
        return self.decoder.step(text, words, memory[blocks:], past, remember[blocks:])

    def _parts(self, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.decoder.width
        return text_tokens[..., :-inner], text_tokens[..., -inner:]
