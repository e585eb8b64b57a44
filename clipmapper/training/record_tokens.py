"""Tokens of a frozen encoder for records, computed once; their room and time are said before."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.data.records import Record
from clipmapper.data.tables.builder import as_table
from clipmapper.data.token_cache import TokenCache, TokenStore, size_of
from clipmapper.host.progress import progress, span
from clipmapper.models.encoder import ClipEncoder
from clipmapper.training.encoder_tokens import (
    AskedTexts,
    Reader,
    RecordImages,
    asked_texts,
    image_key,
    image_shape,
    image_tokens,
    text_key,
    text_tokens,
)
from clipmapper.training.shown import console

_TRIED = 64  # images or texts by which the time is measured ...
_TIMES = 3  # ... so often; the fastest counts, for a machine that is busy for a moment is no measure


def check_tokens(
    encoder: ClipEncoder, store: TokenStore, splits: Mapping[str, tuple[RecordImages, AskedTexts | None]]
) -> None:
    """Raise ``UserError`` where the tokens of all splits together have no room; otherwise say their size, and
    how long it will take to compute those that are not there, measured by encoding a few.

    ``splits``: name → the images, and the texts of the questions about them (None: none are kept).
    """
    encoder.eval()
    images = image_shape(encoder)
    asked = [texts for _, texts in splits.values() if texts is not None]
    shapes = {"images": (sum(len(source) for source, _ in splits.values()), *images)}
    if asked:
        # Each split has rows as long as its longest text; the longest of all is a little more.
        longest = max(texts.longest for texts in asked)
        shapes["texts"] = (sum(map(len, asked)), longest, encoder.text_width)
    left, files = {kind: shape[0] for kind, shape in shapes.items()}, []
    if store.folder is not None:
        of_images = [
            store.file("images", image_key(encoder, store, source), len(source), images)
            for source, _ in splits.values()
        ]
        of_texts = [
            store.file(
                "texts", text_key(encoder, store, texts), len(texts), (texts.longest, encoder.text_width)
            )
            for texts in asked
        ]
        files = [*of_images, *of_texts]
        left = {"images": sum(file.missing_rows() for file in of_images)}
        left["texts"] = sum(file.missing_rows() for file in of_texts)
    store.check_room(shapes, files)

    counts = " and ".join(f"{shape[0]:,} {kind}" for kind, shape in shapes.items())
    where = "in memory" if store.folder is None else f"in {store.folder}"
    line = f"token cache: {counts}, {size_of(store.bytes_of(shapes))} {where} ({store.precision})"
    if not any(left.values()):
        line += "; all there"
    else:
        source = max((source for source, _ in splits.values()), key=len)
        seconds = left["images"] * _image_seconds(encoder, store, source) if left["images"] else 0.0
        if left.get("texts"):
            seconds += left["texts"] * _text_seconds(encoder, max(asked, key=len))
        some = "" if left == {kind: shape[0] for kind, shape in shapes.items()} else "the rest "
        line += f"; {some}takes about {span(seconds)}"
    console().print(line, markup=False, soft_wrap=True, highlight=False)


@torch.no_grad()
def _image_seconds(encoder: ClipEncoder, store: TokenStore, source: RecordImages) -> float:
    """Measure the time of one image. Workers prepare images while others are encoded."""
    device = next(encoder.parameters()).device
    rows = range(min(_TRIED, len(source)))
    loading, loaded = _timed(lambda: source.load(rows))
    encoding, _ = _timed(lambda: encoder.image_tokens(loaded.to(device)).cpu())
    both = max(loading / store.workers, encoding) if store.workers else loading + encoding
    return both / len(rows)


@torch.no_grad()
def _text_seconds(encoder: ClipEncoder, texts: AskedTexts) -> float:
    device = next(encoder.parameters()).device
    some = texts.padded(range(0, len(texts), max(1, len(texts) // _TRIED))[:_TRIED])
    ids, valid = (of_some.to(device) for of_some in some)
    return _timed(lambda: encoder.text_tokens(ids, valid).cpu())[0] / len(ids)


def _timed(work: Callable):
    """The seconds of the fastest of some calls, and what the last gives: the first warms up."""
    found = work()
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), found


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
    """Tokens of the images and texts of questions, with a progress bar. ``name``: of the split."""
    images, image_of, texts = _looked_at(encoder, store, records, name, reader, texts=True)
    with progress(f"CLIP tokens, {name} split", len(images) + len(texts)) as advance:
        tokens = image_tokens(encoder, store, images, advance)
        asked = text_tokens(encoder, store, texts, advance)
    return TokenCache(asked.tokens, asked.lengths, asked.text_of, tokens, image_of)


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
    """:func:`~clipmapper.training.record_tokens.check_tokens` of records. ``splits``: name → records.
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
    asked = asked_texts(encoder.tokenizer, as_table(records), name) if texts else None
    return _LookedAt(images, image_of, asked)
