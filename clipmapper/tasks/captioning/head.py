"""From the mapper's text tokens to scores of the next word, and where a caption starts and ends."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText, padding_id, text_ids, warn_of_cut
from clipmapper.training.initial import Taken


class UnsayableToken(UserError):
    """A caption has a token that the model cannot say. ``said``: in letters, where they are known."""

    def __init__(self, token: int, said: str | None = None) -> None:
        self.token = token
        what = f"the token {token}" if said is None else repr(said)
        super().__init__(
            f"the caption has {what}, which this model cannot say: it was built with model.vocabulary=data, "
            "the words of its training captions alone"
        )


class Vocabulary(nn.Module):
    """The vocabulary that both heads share: which tokens they can say.

    Parameters
    ----------
    vocabulary : how many tokens the tokenizer has.
    tokens : the ids of those that the head can say, None for all. Every other token has the score −∞. Not in
        the paper, which scores all 49408: with a head for the 70 tokens that captions of the built-in world
        are made of, a step of training takes a tenth of the time on a CPU.
    """

    tokens: Int[Tensor, "known"] | None

    def __init__(self, vocabulary: int, tokens: Sequence[int] | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        known = None if tokens is None else torch.tensor(sorted(set(tokens)))
        # Not among the weights: a checkpoint's description has them.
        self.register_buffer("tokens", known, persistent=False)

    @property
    def known(self) -> int:
        """How many tokens the head can say."""
        return self.vocabulary if self.tokens is None else len(self.tokens)

    def known_scores(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch known"]:
        """Scores of the tokens that the head can say, in the order of their ids."""
        raise NotImplementedError

    def forward(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        """Scores of every token of the tokenizer, by id."""
        scores = self.known_scores(text)
        if self.tokens is None:
            return scores
        every = scores.new_full((*scores.shape[:-1], self.vocabulary), -math.inf)
        every[..., self.tokens] = scores
        return every

    def places(
        self, ids: Int[Tensor, "*batch"], wanted: Bool[Tensor, "*batch"] | None = None
    ) -> Int[Tensor, "*batch"]:
        """Where :meth:`known_scores` has these tokens. Of those that are not ``wanted`` (padding), anywhere.

        Raises ``UserError`` for a token that the head cannot say.
        """
        if self.tokens is None:
            return ids
        found = torch.searchsorted(self.tokens, ids.contiguous()).clamp(max=len(self.tokens) - 1)
        unknown = self.tokens[found] != ids
        if wanted is not None:
            unknown = unknown & wanted
        if bool(unknown.any()):
            raise UnsayableToken(int(ids[unknown][0]))
        return found


class CaptionHead(Vocabulary):
    """One linear map to the vocabulary on every text position (WRA: 512 → 49408)."""

    def __init__(self, width: int, vocabulary: int, tokens: Sequence[int] | None = None) -> None:
        super().__init__(vocabulary, tokens)
        self.layer = nn.Linear(width, self.known)

    def known_scores(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch known"]:
        return self.layer(text)


class TiedCaptionHead(Vocabulary):
    """Scores by comparison with CLIP's own token embeddings (not in the paper).

    Between the mapper's width and another width of the embedding there is a linear map without bias. The
    embedding stays the encoder's: frozen with it, and listed among its weights only.
    """

    def __init__(self, width: int, embedding: nn.Embedding, tokens: Sequence[int] | None = None) -> None:
        vocabulary, embedded = embedding.weight.shape
        super().__init__(vocabulary, tokens)
        self.project = nn.Linear(width, embedded, bias=False) if width != embedded else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(self.known))
        # Kept out of the module tree so that no weight is listed twice.
        self._embedding = (embedding,)

    def known_scores(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch known"]:
        weight = self._embedding[0].weight
        return F.linear(self.project(text), weight if self.tokens is None else weight[self.tokens], self.bias)


class GPT2Head(Vocabulary):
    """GPT-2's own scores of words, for all tokens or some (``tokens``, as of :class:`Vocabulary`)."""

    def __init__(self, language_model: GPT2LMHeadModel, tokens: Sequence[int] | None = None) -> None:
        super().__init__(language_model.config.vocab_size, tokens)
        # Kept out of the module tree so that no weight is listed twice.
        self._scores = (language_model.lm_head,)

    def known_scores(self, text: Float[Tensor, "*batch inner"]) -> Float[Tensor, "*batch known"]:
        weight = self._scores[0].weight
        return F.linear(text, weight if self.tokens is None else weight[self.tokens])


def take_words(head: Vocabulary, other: Vocabulary, taken: Taken) -> None:
    """Give a head the weights of another: of those with a row a token, the rows that both have."""
    if type(head) is not type(other) or head.vocabulary != other.vocabulary:
        taken.nothing("head", head, "that one is of another kind")
        return
    every = torch.arange(head.vocabulary)
    mine, its = (every if one.tokens is None else one.tokens.cpu() for one in (head, other))
    both = torch.isin(mine, its)
    there, rows = dict(other.named_parameters()), torch.searchsorted(its, mine[both])
    for name, weight in head.named_parameters():
        value, count = there[name], 0
        with torch.no_grad():
            if weight.shape == value.shape and torch.equal(mine, its):
                weight.copy_(value)
                count = weight.numel()
            elif len(weight) == len(mine) and weight.shape[1:] == value.shape[1:]:
                weight[both] = value[rows]
                count = value[rows].numel()
            elif weight.shape == value.shape:
                weight.copy_(value)
                count = weight.numel()
        taken.add("head", count, weight.numel())
    if not both.all():
        taken.add("head", 0, 0, f"{int(both.sum())} of {len(mine)} tokens known")


@dataclass(frozen=True)
class CaptionEnds:
    """Ids of the token that every caption begins with and of the one that it ends with."""

    start: int
    end: int


def caption_ends(tokenizer) -> CaptionEnds:
    """Those of a tokenizer. One without a start token (SigLIP's) starts with its end token, as GPT-2 does.

    Raises ``UserError`` for a tokenizer without an end token: its captions would never stop.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        return CaptionEnds(tokenizer.sot_token_id, tokenizer.eot_token_id)
    inner = tokenizer.tokenizer
    starts = [i for i in (inner.bos_token_id, inner.cls_token_id) if i is not None]
    ends = [i for i in (inner.eos_token_id, inner.sep_token_id) if i is not None]
    if not ends:
        raise UserError(
            "this encoder's tokenizer has no end token, so captions would never end; use an architecture "
            "whose tokenizer has one (CLIP's byte pairs, SigLIP's SentencePiece, ...)"
        )
    return CaptionEnds((starts or ends)[0], ends[0])


def caption_tokens(tokenizer, ends: CaptionEnds, captions: Sequence[str]) -> TokenizedText:
    """Token ids with start and end, whatever the tokenizer itself adds, padded behind to the longest.

    A caption longer than the context is cut, with a warning; its end token stays.
    """
    rows = [_words(tokenizer, caption) for caption in captions]
    return with_ends(rows, ends, padding_id(tokenizer))


def caption_vocabulary(tokenizer, captions: Iterable[str]) -> list[int]:
    """The ids of all tokens that these captions are written with, end token included, in order."""
    ends = caption_ends(tokenizer)
    found = {ends.end}
    for caption in captions:
        found.update(_words(tokenizer, caption))
    return sorted(found)


def _words(tokenizer, caption: str) -> list[int]:
    """Ids of a caption, cut so that there is room for start and end, with a warning."""
    found, room = text_ids(tokenizer, caption), tokenizer.context_length - 2
    if len(found) > room:
        warn_of_cut("caption", caption, len(found), room)
    return found[:room]


def with_ends(
    words: Sequence[Sequence[int]], ends: CaptionEnds, padding: int, ended: Sequence[bool] | None = None
) -> TokenizedText:
    """Captions given by the ids of their words, between start and end, padded behind to the longest.

    ``ended``: False for captions that were cut and have no end token.
    """
    rows = [[ends.start, *row] for row in words]
    for row, complete in zip(rows, ended or [True] * len(rows), strict=True):
        row.extend([ends.end] * complete)
    width = max(map(len, rows))
    length, count = (torch.tensor([len(row) for row in group])[:, None] for group in (rows, words))
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    place = torch.arange(width)
    return TokenizedText(ids, place < length, (place > 0) & (place <= count))


def spell(tokenizer, ids: Sequence[int] | Int[Tensor, "words"]) -> str:
    """The text that word ids (without start, end and padding) stand for."""
    ids = [int(i) for i in ids]
    if isinstance(tokenizer, SimpleTokenizer):
        # CLIP's tokenizer parts a mark from the word before it, as any two words.
        return re.sub(r" (?=[,.:;!?](?: |$))", "", " ".join(tokenizer.decode(ids).split()))
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()
