"""The different images and texts of records, and their tokens from a frozen encoder, kept by content."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from clipmapper.data.content import content_digest, file_digests, joint_digest
from clipmapper.data.records import Record, StoredImage
from clipmapper.data.tables.base import Records, unpacked
from clipmapper.data.token_cache import TextTokens, TokenStore
from clipmapper.errors import UserError
from clipmapper.host.progress import progress
from clipmapper.models.encoder import ClipEncoder, image_identity, text_identity
from clipmapper.models.tokens import padding_id, tokenize
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.processes import this_share
from clipmapper.training.shown import console

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


def asked_texts(tokenizer, table: Records, name: str) -> AskedTexts:
    """Tokenise the different texts of questions. ``name``: of their split, for the progress that is told."""
    different, number_of = table.different_questions()
    ids, lengths = [], []
    with progress(f"token ids of texts, {name} split", len(different)) as advance:
        for start in range(0, len(different), _TOGETHER):
            some = [unpacked(text) for text in different[start : start + _TOGETHER].to_pylist()]
            text = tokenize(tokenizer, some)
            ids.append(text.ids[text.valid].int())
            lengths.append(text.valid.sum(dim=1))
            advance(len(some))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), *lengths]).cumsum(dim=0)
    return AskedTexts(torch.cat(ids), starts, torch.from_numpy(number_of), padding_id(tokenizer))


@runtime_checkable
class Reader(Protocol):
    """Reads the images of records: :class:`clipmapper.data.pixels.PixelReader`, or that of a data set.

    ``fast``: whether they may differ a little from those that ``open_clip``'s transform gives.
    """

    fast: bool

    def __call__(self, record: Record) -> Tensor: ...

    def many(self, records: Sequence[Record]) -> Tensor: ...


@dataclass(frozen=True)
class RecordImages:
    """The different images of some records.

    ``records``: one of each image. ``index``: the folder in which digests of files are kept.
    """

    records: Sequence[Record]
    reader: Reader
    index: Path | None

    def __len__(self) -> int:
        return len(self.records)

    def load(self, rows: Sequence[int]) -> Num[Tensor, "images 3 height width"]:
        """Read some images as the encoder takes them; called in workers."""
        return self.reader.many([self.records[row] for row in rows])

    def digest(self) -> str:
        """A digest of the images' content, in their order. Raises ``UserError`` for a file that cannot be
        read."""
        # (Tokens of exactly read images are those of before there was a fast way.)
        return f"{self._content} read fast" if self.reader.fast else self._content

    @cached_property
    def _content(self) -> str:
        images = [record.image for record in self.records]
        paths = [image for image in images if isinstance(image, Path)]
        with progress("images, whether they changed", len(images)) as advance:

            def of_stored(image: bytes | StoredImage) -> str:
                advance(1)
                return _digest(image)

            try:
                of_files = iter(file_digests(paths, self.index, progress=advance))
            except OSError as error:
                raise UserError(f"image={error.filename}: {error.strerror}") from error
            return joint_digest(next(of_files) if isinstance(i, Path) else of_stored(i) for i in images)


def _digest(image: bytes | StoredImage) -> str:
    found = image if isinstance(image, bytes) else image.read()
    return content_digest(found if isinstance(found, bytes) else np.asarray(found))


def token_store(
    config: TrainConfig, encoder: ClipEncoder, *, texts: bool, augment: str = "none"
) -> TokenStore | None:
    """Where the settings want tokens kept; None where every step is to encode.

    Settings that nothing can be done with are named in a line. ``texts``: whether tokens of texts are to be
    kept as well. ``augment``: how images of training are altered.
    """
    training = config.training
    folder = None if training.token_cache_folder is None else Path(training.token_cache_folder)
    why = None
    if not training.token_cache:
        if folder is not None:
            why = "training.token_cache_folder is not used, for training.token_cache=false"
    elif augment != "none":
        why = (
            f"data.augment={augment} and training.token_cache=true exclude each other, for every step has "
            "other images: the token cache was switched off"
        )
    elif not config.encoder.frozen:
        why = "no token cache, for the encoder is trained (encoder.frozen=false): it runs in every step"
    elif texts and encoder.text_tower.appended_class_token:
        # The class token that CoCa's text tower appends would be cut off with a cached text's padding.
        why = "no token cache, for this text tower puts a token behind each text: it runs in every step"
    if why is not None:
        console().print(why, soft_wrap=True)
    if why is not None or not training.token_cache:
        return None
    machine = max(1, this_share().of // config.trainer.num_nodes)
    return TokenStore(folder, training.token_precision, training.token_workers, processes=machine)


def image_shape(encoder: ClipEncoder) -> tuple[int, int]:
    """(tokens, width) of an image."""
    rows, columns = encoder.grid
    return encoder.prefix_tokens + rows * columns, encoder.image_width


def image_key(encoder: ClipEncoder, store: TokenStore, source: RecordImages) -> dict:
    """Everything that tokens of images depend on."""
    of_encoder = store.once("images", lambda: image_identity(encoder))
    return {"encoder": of_encoder, "images": source.digest()}


def text_key(encoder: ClipEncoder, store: TokenStore, texts: AskedTexts) -> dict:
    """Everything that tokens of texts depend on."""
    return {"encoder": store.once("texts", lambda: text_identity(encoder)), "ids": texts.digest()}


def image_tokens(
    encoder: ClipEncoder, store: TokenStore, source: RecordImages, progress: Callable[[int], None]
) -> Float[Tensor, "images tokens width"]:
    """Tokens of every image. A stored file is keyed by encoder, weights, preprocessing and images."""
    encoder.eval()
    device = next(encoder.parameters()).device
    return store.tokens(
        "images",
        lambda: image_key(encoder, store, source),
        len(source),
        image_shape(encoder),
        source.load,
        lambda loaded: encoder.image_tokens(loaded.to(device)),
        progress,
    )


def text_tokens(
    encoder: ClipEncoder, store: TokenStore, texts: AskedTexts, progress: Callable[[int], None]
) -> TextTokens:
    """Tokens of every different text. A stored file is keyed by encoder, weights and the texts' token ids."""
    encoder.eval()
    device, longest = next(encoder.parameters()).device, texts.longest

    def encode(part: tuple[Tensor, Tensor]) -> Tensor:
        ids, valid = (of_part.to(device) for of_part in part)
        tokens = encoder.text_tokens(ids, valid)
        return nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))

    tokens = store.tokens(
        "texts",
        lambda: text_key(encoder, store, texts),
        len(texts),
        (longest, encoder.text_width),
        texts.padded,
        encode,
        progress,
    )
    return TextTokens(tokens, texts.lengths, texts.text_of)
