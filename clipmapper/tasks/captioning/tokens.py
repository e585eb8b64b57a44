"""Where a caption starts and ends: its token ids as a captioner reads and writes them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText, padding_id, text_ids, warn_of_cut


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
