"""A captioner whose words are written by GPT-2."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import Mapper
from clipmapper.models.mapper_blocks import KeysValues, Remember
from clipmapper.tasks.captioning.gpt2 import OwnTokenizer
from clipmapper.tasks.captioning.gpt2_decoder import GPT2Decoder, GPT2Head
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.tokens import CaptionEnds


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
