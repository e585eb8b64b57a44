"""From sentences to token ids, and from scores of token pieces back to words."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a batch of texts, cut to the longest of them.

    ``valid`` is False at padding, known by position: an id may be both padding and a real token (CLIP's
    padding id 0 is also "!"). ``removable`` is False at start, end and padding as well.
    """

    ids: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    removable: Bool[Tensor, "batch tokens"]

    def __getitem__(self, index) -> "TokenizedText":
        return TokenizedText(self.ids[index], self.valid[index], self.removable[index])

    def to(self, device: torch.device | str) -> "TokenizedText":
        return TokenizedText(*(t.to(device) for t in (self.ids, self.valid, self.removable)))


def tokenize(tokenizer, texts: Sequence[str]) -> TokenizedText:
    """Token ids with start and end tokens; a text longer than the context is cut, with a warning."""
    pieces = [_encode(tokenizer, text) for text in texts]
    room = tokenizer.context_length - 2
    for text, ids in zip(texts, pieces, strict=True):
        if len(ids) > room:
            warnings.warn(
                f"text of {len(ids)} tokens is cut to the {room} that the context has room for: "
                f"{text[:60]!r}...",
                stacklevel=2,
            )
    pieces = [ids[:room] for ids in pieces]
    start, end, padding = _special_ids(tokenizer)
    lengths = torch.tensor([len(ids) + (start is not None) + (end is not None) for ids in pieces])
    out = torch.full((len(pieces), int(lengths.max())), padding)
    removable = torch.zeros(out.shape, dtype=torch.bool)
    for row, ids in enumerate(pieces):
        first = int(start is not None)
        whole = [start] * first + ids + ([] if end is None else [end])
        out[row, : len(whole)] = torch.tensor(whole)
        removable[row, first : first + len(ids)] = True
    valid = torch.arange(out.shape[1]) < lengths[:, None]
    return TokenizedText(out, valid, removable)


def merge_words(
    tokenizer, ids: Int[Tensor, "tokens"], removable: Bool[Tensor, "tokens"], scores: Float[Tensor, "tokens"]
) -> list[tuple[str, float]]:
    """Words of one text with the sum of their pieces' scores, in order; start, end and padding left out."""
    words: list[tuple[str, float]] = []
    for word, positions in word_positions(tokenizer, ids, removable):
        words.append((word, float(sum(float(scores[p]) for p in positions))))
    return words


def word_positions(
    tokenizer, ids: Int[Tensor, "tokens"], removable: Bool[Tensor, "tokens"]
) -> list[tuple[str, list[int]]]:
    """Words of one text, each with the positions of the token pieces that it is written with."""
    words: list[tuple[str, list[int]]] = []
    open_word = False
    for position in removable.nonzero().flatten().tolist():
        text, starts, ends = _piece(tokenizer, int(ids[position]))
        if open_word and not starts:
            words[-1] = (words[-1][0] + text, [*words[-1][1], position])
        else:
            words.append((text, [position]))
        open_word = not ends
    return words


def _encode(tokenizer, text: str) -> list[int]:
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.encode(text)
    return tokenizer.tokenizer(tokenizer.clean_fn(text), add_special_tokens=False)["input_ids"]


def _special_ids(tokenizer) -> tuple[int | None, int | None, int]:
    """(start, end, padding); a tokenizer without a start token has None there."""
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.sot_token_id, tokenizer.eot_token_id, 0
    inner = tokenizer.tokenizer
    start = inner.bos_token_id if inner.bos_token_id is not None else inner.cls_token_id
    end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
    return start, end, inner.pad_token_id


def _piece(tokenizer, token: int) -> tuple[str, bool, bool]:
    """(text, starts a word, ends a word) of one token piece."""
    if isinstance(tokenizer, SimpleTokenizer):
        piece = tokenizer.decoder[token]
        ends = piece.endswith("</w>")
        text = bytearray(tokenizer.byte_decoder[c] for c in piece.removesuffix("</w>"))
        # CLIP marks where a word ends; a piece after an end starts the next word.
        return text.decode("utf-8", errors="replace"), False, ends
    piece = tokenizer.tokenizer.convert_ids_to_tokens(token)
    # SentencePiece and byte-level BPE mark where a word starts, so no piece is known to end one.
    starts = piece[:1] in ("▁", "Ġ")
    return piece.lstrip("▁Ġ"), starts, False
