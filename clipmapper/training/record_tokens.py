"""Tokens of a frozen encoder for records: computed once, kept by the content of the image files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from clipmapper.data.content import content_digest, file_digests, joint_digest
from clipmapper.data.records import Record, StoredImage
from clipmapper.data.table_builder import as_table
from clipmapper.data.token_cache import TokenCache, TokenStore
from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import tokenize
from clipmapper.training.encoder_tokens import image_tokens, question_tokens


@dataclass(frozen=True)
class RecordImages:
    """The different images of some records, an :class:`~clipmapper.training.encoder_tokens.ImageSource`.

    ``records``: one of each image. ``index``: the folder in which digests of files are kept.
    """

    records: Sequence[Record]
    transform: Callable[[Image.Image], Tensor]
    index: Path | None

    def __len__(self) -> int:
        return len(self.records)

    def load(self, rows: Sequence[int]) -> Float[Tensor, "images 3 height width"]:
        return torch.stack([self.transform(self.records[row].pil()) for row in rows])

    def pixels(self, loaded: Tensor) -> Tensor:
        return loaded

    def digest(self) -> str:
        """Raises ``UserError`` for a file that cannot be read."""
        return self._content

    @cached_property
    def _content(self) -> str:
        images = [record.image for record in self.records]
        paths = [image for image in images if isinstance(image, Path)]
        with Progress(transient=True) as progress:
            task = progress.add_task("images, whether they changed", total=len(images))

            def advance(done: int) -> None:
                progress.advance(task, done)

            def of_stored(image: bytes | StoredImage) -> str:
                advance(1)
                return _digest(image)

            try:
                of_files = iter(file_digests(paths, self.index, progress=advance))
            except OSError as error:
                raise UserError(f"image={error.filename}: {error.strerror}") from error
            return joint_digest(next(of_files) if isinstance(i, Path) else of_stored(i) for i in images)


def different_images(
    records: Sequence[Record], transform: Callable[[Image.Image], Tensor], index: Path | None
) -> tuple[RecordImages, Int[Tensor, "records"]]:
    """The images of records, in the order in which they first come, and which of them each record has."""
    table = as_table(records)
    first, image_of = table.first_of_images()
    return RecordImages(table.take(first), transform, index), torch.from_numpy(image_of)


def record_question_tokens(
    encoder: ClipEncoder, store: TokenStore, records: Sequence[Record], name: str
) -> TokenCache:
    """Tokens of the images and texts of questions. ``name``: of the split."""
    images, image_of = _images_to_encode(encoder, store, records)
    return question_tokens(encoder, store, images, as_table(records).questions(), image_of, name)


def record_image_tokens(
    encoder: ClipEncoder, store: TokenStore, records: Sequence[Record], name: str
) -> tuple[Float[Tensor, "images tokens width"], Int[Tensor, "records"]]:
    """Tokens of images, and which of them each record has, with a progress bar."""
    images, image_of = _images_to_encode(encoder, store, records)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"CLIP tokens, {name} split", total=len(images))
        tokens = image_tokens(encoder, store, images, lambda done: progress.advance(task, done))
    return tokens, image_of


def check_room(
    encoder: ClipEncoder, store: TokenStore, splits: Iterable[Sequence[Record]], *, texts: bool
) -> None:
    """Raise ``UserError``, before anything is encoded, where the tokens of all splits have no room in memory.

    ``texts``: whether those of the questions are kept as well.
    """
    if store.folder is not None:
        return
    splits = [as_table(records) for records in splits]
    images = sum(len(np.unique(records.images)) for records in splits)
    rows, columns = encoder.grid
    shapes = {"images": (images, encoder.prefix_tokens + rows * columns, encoder.image_width)}
    if texts:
        asked = [sorted(set(records.questions())) for records in splits]
        # Each split has rows as long as its longest text; the longest of all is a little more.
        longest = max(tokenize(encoder.tokenizer, some).ids.shape[1] for some in asked)
        shapes["texts"] = (sum(map(len, asked)), longest, encoder.text_width)
    store.check_room(shapes)


def _images_to_encode(
    encoder: ClipEncoder, store: TokenStore, records: Sequence[Record]
) -> tuple[RecordImages, Int[Tensor, "records"]]:
    images, image_of = different_images(records, encoder.preprocess(), store.folder)
    if store.folder is not None:
        images.digest()  # which has a progress bar of its own, before the next one
    return images, image_of


def _digest(image: bytes | StoredImage) -> str:
    found = image if isinstance(image, bytes) else image.read()
    return content_digest(found if isinstance(found, bytes) else np.asarray(found))
