"""The different texts that questions ask, as token ids: made once, and kept without padding."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clipmapper.data.tables.base import Records, unpacked
from clipmapper.host.progress import progress
from clipmapper.models.tokens import padding_id, tokenize

_TOGETHER = 4096  # texts that are Python's at a time


@dataclass(frozen=True)
class AskedTexts:
    """The different texts of questions, in order.

    Attributes
    ----------
    ids : of all texts, one behind the other.
    starts : of every text in ``ids``, and where the last one ends.
    text_of : which of the texts every question asks.
    padding : the id that texts are filled up with.
    """

    ids: Int[Tensor, "pieces"]
    starts: Int[Tensor, "texts_and_end"]
    text_of: Int[Tensor, "questions"]
    padding: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int[Tensor, "texts"]:
        return self.starts.diff()

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def padded(
        self, rows: Sequence[int], length: int | None = None
    ) -> tuple[Int[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"]]:
        """The ids of some texts, and which of them are no padding. ``length``: None: of the longest."""
        numbers = torch.tensor(list(rows))
        lengths = self.lengths[numbers]
        places = torch.arange(int(lengths.max()) if length is None else length)
        valid = places < lengths[:, None]
        found = self.ids[(self.starts[numbers][:, None] + places).clamp(max=len(self.ids) - 1)].long()
        return found.masked_fill(~valid, self.padding), valid

    def digest(self) -> str:
        """A digest of what the text tower reads, texts and tokenizer in one:
        :func:`~clipmapper.models.encoder.weights_digest` of all ids and of what is no padding."""
        shape, digest = [len(self), self.longest], hashlib.blake2b(digest_size=16)
        for number, name in enumerate(("ids torch.int64", "valid torch.bool")):
            digest.update(f"{name} {shape};".encode())
            for start in range(0, len(self), _TOGETHER):
                rows = range(start, min(start + _TOGETHER, len(self)))
                digest.update(self.padded(rows, self.longest)[number].numpy())
        return digest.hexdigest()


def asked_texts(tokenizer, texts: Sequence[str], name: str) -> AskedTexts:
    """Tokenise the different texts of questions. ``name``: of their split, for the progress that is told."""
    different = sorted(set(texts))
    place = {text: number for number, text in enumerate(different)}
    return _tokenized(tokenizer, different, len(different), torch.tensor([place[t] for t in texts]), name)


def asked_by_records(tokenizer, table: Records, name: str) -> AskedTexts:
    """:func:`asked_texts` of a table of questions."""
    different, number_of = table.different_questions()
    parts = (different[start : start + _TOGETHER] for start in range(0, len(different), _TOGETHER))
    texts = (unpacked(text) for part in parts for text in part.to_pylist())
    return _tokenized(tokenizer, texts, len(different), torch.from_numpy(number_of), name)


def _tokenized(
    tokenizer, texts: Iterable[str], count: int, text_of: Int[Tensor, "questions"], name: str
) -> AskedTexts:
    ids, lengths, left = [], [], iter(texts)
    with progress(f"token ids of texts, {name} split", count) as advance:
        while some := list(islice(left, _TOGETHER)):
            text = tokenize(tokenizer, some)
            ids.append(text.ids[text.valid].int())
            lengths.append(text.valid.sum(dim=1))
            advance(len(some))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), *lengths]).cumsum(dim=0)
    return AskedTexts(torch.cat(ids), starts, text_of, padding_id(tokenizer))
