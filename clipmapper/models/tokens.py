"""Turn sentences into token ids, and scores of token pieces into those of words."""

import hashlib
import multiprocessing
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

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

    def padded(self, length: int, padding_id: int) -> "TokenizedText":
        """The same texts with padding up to ``length`` tokens."""
        extra = (0, max(0, length - self.ids.shape[1]))
        pad = torch.nn.functional.pad
        return TokenizedText(
            pad(self.ids, extra, value=padding_id), pad(self.valid, extra), pad(self.removable, extra)
        )

    def to(self, device: torch.device | str) -> "TokenizedText":
        return TokenizedText(*(t.to(device) for t in (self.ids, self.valid, self.removable)))


def tokenize(tokenizer, texts: Sequence[str], whole_context: bool = False) -> TokenizedText:
    """Token ids with start and end tokens; a text longer than the context is cut, with a warning.

    ``whole_context``: as many ids as the context has, rather than as many as the longest text. For text
    towers whose words read the padding (``TextTower.padding_matters``).
    """
    rows = []
    for text in texts:
        ids, of_text, wanted = _encode(tokenizer, text)
        if wanted > sum(of_text):
            warn_of_cut("text", text, wanted, sum(of_text))
        rows.append((ids, of_text))
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    width = tokenizer.context_length if whole_context else int(lengths.max())
    out = torch.full((len(rows), width), padding_id(tokenizer))
    removable = torch.zeros(out.shape, dtype=torch.bool)
    valid = torch.arange(width) < lengths[:, None]
    out[valid] = torch.tensor([i for ids, _ in rows for i in ids])
    removable[valid] = torch.tensor([flag for _, of_text in rows for flag in of_text])
    return TokenizedText(out, valid, removable)


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text itself, without start and end; cut as by :func:`tokenize`, with a warning."""
    ids, of_text, wanted = _encode(tokenizer, text)
    kept = [one for one, flag in zip(ids, of_text, strict=True) if flag]
    if wanted > len(kept):
        warn_of_cut("text", text, wanted, len(kept))
    return kept


def padding_id(tokenizer) -> int:
    """The id that a CLIP's tokenizer pads with."""
    return 0 if isinstance(tokenizer, SimpleTokenizer) else int(tokenizer.tokenizer.pad_token_id)


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
    positions = removable.nonzero().flatten().tolist()
    pieces = ids[removable].tolist()
    words: list[tuple[list[int], list[int]]] = []
    for position, piece, starts in zip(positions, pieces, _word_starts(tokenizer, pieces), strict=True):
        if starts:
            words.append(([], []))
        words[-1][0].append(piece)
        words[-1][1].append(position)
    return [(_text(tokenizer, word), where) for word, where in words]


def _encode(tokenizer, text: str) -> tuple[list[int], list[bool], int]:
    """Ids of one text with start and end tokens, which are of the text itself, how many it has uncut."""
    if isinstance(tokenizer, SimpleTokenizer):
        if _PLAIN.fullmatch(text):
            pieces = [piece for word in _WORD.findall(text) for piece in _pieces(tokenizer, word)]
        else:
            pieces = tokenizer.encode(text)
        kept = pieces[: tokenizer.context_length - 2]
        ids = [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]
        return ids, [False, *[True] * len(kept), False], len(pieces)
    # Which special tokens there are, and where, is for the tokenizer to say: SigLIP's has no start token.
    inner, cleaned = tokenizer.tokenizer, tokenizer.clean_fn(text)
    options = {"return_special_tokens_mask": True, "verbose": False}
    encoded = inner(cleaned, **options)
    wanted = encoded["special_tokens_mask"].count(0)
    if len(encoded["input_ids"]) > tokenizer.context_length:
        encoded = inner(cleaned, truncation=True, max_length=tokenizer.context_length, **options)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if tokenizer.strip_sep_token and ids[-1] == inner.sep_token_id:
        ids, special = ids[:-1], special[:-1]  # CLIPA was trained without its tokenizer's end token
    return ids, [not flag for flag in special], wanted


# In such a text there is nothing to clean, and CLIP's tokenizer takes letters, digits and marks apart.
# To clean it takes most of the time of encoding, and word by word most of them are known already.
# (A mark within a word is another matter: some tokenizers clean it away and join what it parted.)
_PLAIN = re.compile(r"(?:[A-Za-z0-9 ]|[,.:?](?= |$))*")
_WORD = re.compile(r"[A-Za-z]+|[0-9,.:?]")


@lru_cache(maxsize=10_000)
def _pieces(tokenizer: SimpleTokenizer, word: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(word))


def _word_starts(tokenizer, pieces: Sequence[int]) -> list[bool]:
    """Whether each token piece is the first of a word."""
    if isinstance(tokenizer, SimpleTokenizer):
        # CLIP marks where a word ends; what comes after an end starts the next word.
        return [True, *(tokenizer.decoder[piece].endswith("</w>") for piece in pieces[:-1])][: len(pieces)]
    names = tokenizer.tokenizer.convert_ids_to_tokens(list(pieces))
    model = getattr(getattr(tokenizer.tokenizer, "backend_tokenizer", None), "model", None)
    continues = getattr(model, "continuing_subword_prefix", None)
    if continues:  # BERT's word pieces
        return [i == 0 or not name.startswith(continues) for i, name in enumerate(names)]
    # SentencePiece and byte-level pieces mark the space before a word.
    return [i == 0 or name.startswith(("▁", "Ġ")) for i, name in enumerate(names)]


def _text(tokenizer, pieces: Sequence[int]) -> str:
    """Spell one word from its pieces. Decoded together: a character may be spread over several."""
    if not isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.tokenizer.decode(list(pieces)).strip()
    spelled = "".join(tokenizer.decoder[piece] for piece in pieces).removesuffix("</w>")
    return bytes(tokenizer.byte_decoder[c] for c in spelled).decode("utf-8", errors="replace")


_PLACES = 2**23  # of a bit each: 100,000 different texts are counted to half a per cent


class CutTexts:
    """Counts different texts, in all processes that are forked while it is there.

    A text has one of 2²³ places by its digest; what is counted is places.
    """

    def __init__(self, aloud: bool = True) -> None:
        self.aloud = aloud
        shared = multiprocessing.get_context("fork")
        self._marks = shared.RawArray("B", _PLACES // 8)
        self._count = shared.Value("q", 0)

    @property
    def count(self) -> int:
        return self._count.value

    def add(self, text: str) -> bool:
        """Add a text; True if it is the first of all."""
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        byte, bit = divmod(int.from_bytes(digest, "big") % _PLACES, 8)
        with self._count.get_lock():
            if self._marks[byte] >> bit & 1:
                return False
            self._marks[byte] |= 1 << bit
            self._count.value += 1
            return self._count.value == 1


_counting: CutTexts | None = None


@contextmanager
def cut_texts_said_once(aloud: bool = True) -> Iterator[CutTexts]:
    """Within the block the first text that is cut is said, with an example, and at its end how many were.

    ``aloud``: False for all processes of several but one, which would say the same.
    """
    global _counting
    before, counted = _counting, CutTexts(aloud)
    _counting = counted
    try:
        yield counted
    finally:
        _counting = before
        if aloud and counted.count > 1:
            warnings.warn(f"{counted.count} different texts were longer than the context", stacklevel=3)


def warn_of_cut(kind: str, text: str, tokens: int, room: int) -> None:
    """Say that the end of a text (``kind``: "text", "caption") is not read."""
    what = f"{kind} of {tokens} tokens is cut to the {room} that the context has room for: {text[:60]!r}..."
    if _counting is None:
        warnings.warn(what, stacklevel=3)
    elif _counting.add(text) and _counting.aloud:
        warnings.warn(f"{what} (others are counted, and not said one by one)", stacklevel=3)
