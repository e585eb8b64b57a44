"""CLIPmapper for image captioning: encoder, causal mapper and a head over the vocabulary."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import Mapper
from clipmapper.models.mapper_blocks import KeysValues, Remember
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import CaptionEnds, Vocabulary, caption_ends, caption_tokens
from clipmapper.tasks.recording import TwoStage


class Captioner(TwoStage):
    """Huang et al. 2023 (arXiv 2308.10240): a CLIP, a causal attention mapper, and a head on every word.

    Parameters
    ----------
    mapper : built with ``captioning=True``.
    ends : start and end token; by default those of the encoder's tokenizer.
    text_embedding_only : the caption so far does not pass CLIP's text tower; the mapper reads its token and
        position embeddings. Needed for a CLIP whose words read later words (SigLIP).

    Raises ``UserError`` for such a CLIP without that option.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        mapper: Mapper,
        head: Vocabulary,
        *,
        ends: CaptionEnds | None = None,
        text_embedding_only: bool = False,
    ) -> None:
        super().__init__(encoder, mapper, head)
        if not mapper.captioning:
            raise ValueError("a captioner's mapper must be built with captioning=True")
        if not (encoder.text_tower.causal or text_embedding_only):
            raise UserError(
                f"encoder.architecture={encoder.architecture}: the words of its text tower read the words "
                "behind them, so it cannot read a caption that is being written; use a CLIP with a causal "
                "text tower (ViT-B-32, ...), or model.text_embedding_only=true to leave the tower out"
            )
        self.text_embedding_only = text_embedding_only
        self._ends = ends

    task = "captioning"
    only = "only_text"

    # Which attention sub-layers (by the names that a trace has for them) end in what the head reads.
    read_from = "mapper"

    @property
    def tokenizer(self):
        """That of captions: the encoder's."""
        return self.encoder.tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest caption that there is room for behind the start token."""
        return self.encoder.context_length - 1

    @property
    def ends(self) -> CaptionEnds:
        if self._ends is None:
            self._ends = caption_ends(self.tokenizer)
        return self._ends

    def forward(
        self,
        images: Num[Tensor, "batch 3 height width"],
        text: TokenizedText,
        *,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        text_ignore: Bool[Tensor, "batch tokens"] | None = None,
        image_keep: Int[Tensor, "batch kept"] | None = None,
        only_text: bool = True,
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Logits of the token that follows each token of the given captions (teacher forcing).

        ``image_ignore`` and ``text_ignore``: True for patches and words that no attention of either stage
        reads. ``image_keep``: the same by physical removal, indices of the patches that stay.
        ``only_text=False`` computes the mapper's last block for the image too, as tracing needs; the logits
        are the same.
        """
        image_tokens = self.encoder.image_tokens(images, keep=image_keep, ignore=image_ignore)
        text_tokens = self.text_tokens(text.ids, text.valid, ignore=text_ignore)
        valid = text.valid if text_ignore is None else text.valid & ~text_ignore
        return self.caption_logits(
            image_tokens, text_tokens, valid, keep=image_keep, image_ignore=image_ignore, only_text=only_text
        )

    def text_tokens(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"],
        ignore: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens text_width"]:
        """Captions as the mapper is given them: none of the tokens knows of a later one."""
        if self.text_embedding_only:
            return self.encoder.text_tower.embed_words(ids)
        # Behind them CoCa's class token, which has read the whole caption.
        return self.encoder.text_tokens(ids, valid, ignore=ignore)[:, : ids.shape[1]]

    def caption_logits(
        self,
        image_tokens: Float[Tensor, "images image image_width"],
        text_tokens: Float[Tensor, "batch tokens text_width"],
        valid: Bool[Tensor, "batch tokens"],
        *,
        keep: Int[Tensor, "batch kept"] | None = None,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        only_text: bool = True,
        known_only: bool = False,
    ) -> Float[Tensor, "batch tokens scored"]:
        """Stage 2 alone, from the encoder's tokens (cached, or shared by several captions of an image).

        ``known_only``: just the tokens that the head can say (:meth:`Vocabulary.known_scores`), for training.
        With fewer images than captions, each image is for so many captions in succession: its side of the
        mapper runs once. Neither ``keep`` nor ``image_ignore`` is possible then, and padding may only be
        behind the captions.
        """
        if len(image_tokens) < len(text_tokens):
            if keep is not None or image_ignore is not None:
                raise ValueError("patches can be left out where every caption has an image of its own")
            text = self._several(image_tokens, text_tokens)
        else:
            text = self.whole_caption_states(
                image_tokens, text_tokens, valid, keep=keep, image_ignore=image_ignore, only_text=only_text
            )
        return self.head.known_scores(text) if known_only else self.head(text)

    def whole_caption_states(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch tokens text_width"],
        valid: Bool[Tensor, "batch tokens"],
        *,
        keep: Int[Tensor, "batch kept"] | None,
        image_ignore: Bool[Tensor, "batch patches"] | None,
        only_text: bool,
    ) -> Float[Tensor, "batch tokens width"]:
        """The states that the head reads, for captions with an image each."""
        _, text = self.mapper(
            image_tokens,
            text_tokens,
            keep=keep,
            image_ignore=image_ignore,
            text_valid=valid,
            only_text=only_text,
        )
        return text

    def scores(self, state: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """The head on tokens of the residual stream that it was made for."""
        return self.head(state)

    def _several(
        self,
        image_tokens: Float[Tensor, "images image image_width"],
        text_tokens: Float[Tensor, "captions tokens text_width"],
    ) -> Float[Tensor, "captions tokens width"]:
        """Final text tokens of several captions of each image."""
        nothing_before = [lambda key, value: (key, value)] * (self.caches - self._tower_caches)
        return self.word_states(text_tokens, self.image_memory(image_tokens), 0, nothing_before)

    @property
    def _tower_caches(self) -> int:
        return 0 if self.text_embedding_only else len(self.encoder.text_tower.attention_blocks())

    @property
    def caches(self) -> int:
        """How many attention sub-layers remember earlier words while a caption is written."""
        return self._tower_caches + len(self.mapper.blocks)

    def image_memory(
        self,
        image_tokens: Float[Tensor, "images image image_width"],
        keep: Int[Tensor, "images kept"] | None = None,
    ) -> list[KeysValues]:
        """All that words read of images, computed once for all words."""
        return self.mapper.image_memory(image_tokens, keep)

    def word_states(
        self,
        text_tokens: Float[Tensor, "rows new text_width"],
        memory: Sequence[KeysValues],
        past: int,
        remember: Sequence[Remember],
    ) -> Float[Tensor, "rows new width"]:
        """States for the head, of words behind ``past`` others; arguments as of ``Mapper.text_step``."""
        return self.mapper.text_step(text_tokens, memory, past, remember)

    def text_tokens_step(
        self, ids: Int[Tensor, "rows new"], past: int, remember: Sequence[Remember]
    ) -> Float[Tensor, "rows new text_width"]:
        """:meth:`text_tokens` of words behind ``past`` others."""
        tower = self.encoder.text_tower
        return tower.embed_words(ids, past) if self.text_embedding_only else tower.step(ids, past, remember)

    def step_logits(
        self,
        ids: Int[Tensor, "rows new"],
        memory: Sequence[KeysValues],
        past: int,
        remember: Sequence[Remember],
        known_only: bool = False,
    ) -> Float[Tensor, "rows scored"]:
        """Logits of the token behind ``ids``, which themselves come behind ``past`` others.

        ``memory``: of :meth:`image_memory`; each image is for so many rows in succession as there
        are more rows than images. ``remember``: one for each of the ``caches``. ``known_only`` as in
        :meth:`caption_logits`.
        """
        own = self._tower_caches
        text_tokens = self.text_tokens_step(ids, past, remember[:own])
        last = self.word_states(text_tokens, memory, past, remember[own:])[:, -1]
        return self.head.known_scores(last) if known_only else self.head(last)

    @torch.no_grad()
    def caption(self, image, decoding: Decoding | None = None) -> str:
        """The caption of an image (a path, a PIL image, an array).

        ``decoding``: a :class:`clipmapper.tasks.captioning.decoding.Decoding`, by default a beam of
        five, and captions as long as there is room for. Of several captions the first is returned.
        """
        with self.evaluating():
            image_tokens = self.encoder.image_tokens(self.load_image(image))
        return write_captions(self, image_tokens, decoding or Decoding(max_length=self.longest)).texts[0][0]

    def tokenize(self, captions: str | Sequence[str]) -> TokenizedText:
        """Token ids of one or more captions, with start and end. Raises ``UserError`` for an empty one."""
        texts = [captions] if isinstance(captions, str) else list(captions)
        if not texts or any(not text.strip() for text in texts):
            raise UserError("the caption is empty; give for example 'a red circle left of a blue square'")
        return caption_tokens(self.tokenizer, self.ends, texts).to(self.device)


def caption_loss(
    logits: Float[Tensor, "batch tokens vocabulary"],
    text: TokenizedText,
    label_smoothing: float = 0.0,
    weight: Float[Tensor, "vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every token but the first, given those before it; the end token counts.

    ``weight``: how much each token of the vocabulary counts in the mean.

    Padding is left out by its position. (The released code ignores the id 0 instead, which in CLIP's
    vocabulary is also "!", and so never learns that token.)
    """
    wanted = text.valid[:, 1:]
    return F.cross_entropy(
        logits[:, :-1][wanted], text.ids[:, 1:][wanted], weight, label_smoothing=label_smoothing
    )
