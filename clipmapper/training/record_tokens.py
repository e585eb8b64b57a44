"""Tokens of a frozen encoder for records: computed once, kept by the content of the image files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from clipmapper.data.content import content_digest, file_digests, joint_digest
from clipmapper.data.records import Record, StoredImage
from clipmapper.data.tables.builder import as_table
from clipmapper.data.token_cache import TokenCache, TokenStore
from clipmapper.errors import UserError
from clipmapper.host.progress import progress
from clipmapper.models.encoder import ClipEncoder
from clipmapper.training.asked_texts import AskedTexts, asked_by_records
from clipmapper.training.encoder_tokens import image_tokens, question_tokens
from clipmapper.training.token_room import check_tokens


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
    """The different images of some records, an :class:`~clipmapper.training.encoder_tokens.ImageSource`.

    ``records``: one of each image. ``index``: the folder in which digests of files are kept.
    """

    records: Sequence[Record]
    reader: Reader
    index: Path | None

    def __len__(self) -> int:
        return len(self.records)

    def load(self, rows: Sequence[int]) -> Num[Tensor, "images 3 height width"]:
        return self.reader.many([self.records[row] for row in rows])

    def pixels(self, loaded: Tensor) -> Tensor:
        return loaded

    def digest(self) -> str:
        """Raises ``UserError`` for a file that cannot be read."""
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


def different_images(
    records: Sequence[Record], reader: Reader, index: Path | None
) -> tuple[RecordImages, Int[Tensor, "records"]]:
    """The images of records, in the order in which they first come, and which of them each record has."""
    table = as_table(records)
    first, image_of = table.first_of_images()
    return RecordImages(table.take(first), reader, index), torch.from_numpy(image_of)


def record_question_tokens(
    encoder: ClipEncoder, store: TokenStore, records: Sequence[Record], name: str, reader: Reader
) -> TokenCache:
    """Tokens of the images and texts of questions. ``name``: of the split."""
    images, image_of, texts = _looked_at(encoder, store, records, name, reader, texts=True)
    return question_tokens(encoder, store, images, texts, image_of, name)


def record_image_tokens(
    encoder: ClipEncoder, store: TokenStore, records: Sequence[Record], name: str, reader: Reader
) -> tuple[Float[Tensor, "images tokens width"], Int[Tensor, "records"]]:
    """Tokens of images, and which of them each record has, with a progress bar."""
    images, image_of, _ = _looked_at(encoder, store, records, name, reader, texts=False)
    with progress(f"CLIP tokens, {name} split", len(images)) as advance:
        tokens = image_tokens(encoder, store, images, advance)
    return tokens, image_of


def check_room(
    encoder: ClipEncoder,
    store: TokenStore,
    splits: Mapping[str, Sequence[Record]],
    reader: Reader,
    *,
    texts: bool,
) -> None:
    """:func:`~clipmapper.training.token_room.check_tokens` of records. ``splits``: name → records.
    ``reader``: of the data.

    ``texts``: whether those of the questions are kept as well.
    """
    whole = {}
    for name, records in splits.items():
        found = _looked_at(encoder, store, records, name, reader, texts=texts)
        store.sources[name] = (records, found)
        whole[name] = (found.images, found.texts)
    check_tokens(encoder, store, whole)


class _LookedAt(NamedTuple):
    images: RecordImages
    image_of: Int[Tensor, "records"]
    texts: AskedTexts | None


def _looked_at(
    encoder: ClipEncoder,
    store: TokenStore,
    records: Sequence[Record],
    name: str,
    reader: Reader,
    *,
    texts: bool,
) -> _LookedAt:
    """Look up what there is to encode: for records that :func:`check_room` was given, its findings."""
    of, found = store.sources.pop(name, (None, None))
    if of is records:
        return found
    images, image_of = different_images(records, reader, store.folder)
    if store.folder is not None:
        images.digest()  # which has a progress bar of its own, before the next one
    asked = asked_by_records(encoder.tokenizer, as_table(records), name) if texts else None
    return _LookedAt(images, image_of, asked)


def _digest(image: bytes | StoredImage) -> str:
    found = image if isinstance(image, bytes) else image.read()
    return content_digest(found if isinstance(found, bytes) else np.asarray(found))
