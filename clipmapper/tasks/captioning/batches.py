"""Batches of images with captions, of records that have numbers and of records that come as a stream."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from clipmapper.data.records import Item, Record, RecordData, RecordDataset
from clipmapper.data.tables.base import Records
from clipmapper.data.token_cache import TokenStore
from clipmapper.tasks.captioning.head import caption_tokens
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.training.batches import Collate, ReadableItems, SplitBatches, shard_batches
from clipmapper.training.explained import whole_picture
from clipmapper.training.processes import WHOLE, Share
from clipmapper.training.record_tokens import record_image_tokens


class CaptionCollate(Collate):
    """A batch of images with one caption each, as
    :class:`clipmapper.tasks.captioning.training.CaptionModule` documents it."""

    def without_images(self, records: Sequence[Record], captions: Sequence[str]) -> dict:
        return {
            "text": self.tokenize(captions),
            "references": [list(record.captions) for record in records],
            "ids": [record.id for record in records],
        }


class References(Sequence[Sequence[str]]):
    """The captions of records, read when they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sequence[str]:
        return self.records[number].captions


class CaptionBatches(SplitBatches):
    """Batches of one split of ``data``, of which ``records`` are taken.

    With a ``store`` the image tower runs once over the split, otherwise in every step. Captions are never
    cached: each time they may be others. ``name``: of the split.
    """

    def __init__(
        self, model: Captioner, data: RecordData, name: str, records: Records, store: TokenStore | None
    ) -> None:
        self.records, self.labelled_at_most = records, data.labelled_at_most
        reader = data.reader(model.encoder)
        self.dataset = RecordDataset(records, reader)
        self.collate = CaptionCollate(partial(caption_tokens, model.tokenizer, model.ends))
        self.image_tokens: Tensor | None = None
        if store is not None:
            self.image_tokens, self.image_of = record_image_tokens(
                model.encoder, store, records, name, reader
            )

    @property
    def references(self) -> Sequence[Sequence[str]]:
        return References(self.records)

    def batch(self, images: Sequence[int], captions: Sequence[str]) -> dict:
        """A batch of these images and their captions, as many of each."""
        if self.image_tokens is not None:
            batch = self.collate.without_images([self.records[number] for number in images], captions)
            return batch | {"image_tokens": self.image_tokens[self.image_of[list(images)]].float()}
        return self.collate([self.dataset[number] for number in images], captions)

    def labelled_batch(self, rows: Sequence[int]) -> dict:
        """Images with their numbers; the caption is the first."""
        captions = [self.records[number].captions[0] for number in rows]
        return self.batch(rows, captions) | {"numbers": list(rows)}

    def picture(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image to be looked at."""
        return whole_picture(self.records[image])


class StreamedCaptions:
    """Batches of training images that come as a stream. ``folder``: of the run."""

    def __init__(self, model: Captioner, data: RecordData, seed: int, folder: Path) -> None:
        self.data, self.seed = data, seed
        self.items = ReadableItems(data.reader(model.encoder), data.on_bad_image, folder)
        self.collate = CaptionCollate(partial(caption_tokens, model.tokenizer, model.ends))

    @cached_property
    def references(self) -> Sequence[Sequence[str]]:
        """All of them, for what needs every caption (scst): the stream is read through once."""
        return References(self.data.every_training_record())

    def batches(self, batch_size: int, captions: int) -> Callable[[int, Share], dict]:
        """A share of the training batch of every step: each image with ``captions`` newly drawn captions."""

        def batch_of(items: Sequence[Item], step: int) -> dict:
            drawn = []
            for record, _ in items:
                rng = random.Random(f"captions/{self.seed}/{step}/{record.id}")
                drawn += [rng.choice(record.captions) for _ in range(captions)]
            return self.collate(items, drawn)

        return shard_batches(self.data.stream(self.seed), self.items, batch_of, batch_size)


# Steps whose images are drawn together, then put in batches by the length of their captions: with 8, a batch
# of 64 with two captions each is padded to 23 tokens instead of 36.
_TOGETHER = 8


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


@dataclass(frozen=True)
class Stage:
    """A part of training: which images, and which captions of them.

    Attributes
    ----------
    draw : a caption of an image of ``split``, in words of its own each time.
    until : the step at which the next stage begins, None for the last one.
    often, often_share : numbers of images that are drawn besides, and for which share of all.
    """

    split: CaptionBatches
    draw: Callable[[int, random.Random], str]
    until: int | None = None
    often: Sequence[int] = ()
    often_share: float = 0.0

    def images(self, numbers: range, seed: int, rng: random.Random) -> list[int]:
        """Images for the places ``numbers`` of an endless row of epochs: every image once an epoch, but for
        those in whose place another is drawn."""
        count = len(self.split.records)
        found = [_order(seed, number // count, count)[number % count] for number in numbers]
        if not self.often or not self.often_share:
            return found
        return [rng.choice(self.often) if rng.random() < self.often_share else image for image in found]


def drawn_batches(
    stages: Sequence[Stage], *, batch_size: int, captions: int, seed: int
) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step: images, each with ``captions`` newly drawn captions.

    Images whose captions are about as long come in the same batch.
    """

    @lru_cache(maxsize=1)
    def together(number: int) -> tuple[Stage, list[list[tuple[int, list[str]]]]]:
        step, size = number * _TOGETHER, _TOGETHER * batch_size
        stage = next(stage for stage in stages if stage.until is None or step < stage.until)
        rng = random.Random(f"captions/{seed}/{number}")
        images = stage.images(range(number * size, (number + 1) * size), seed, rng)
        drawn = [(image, [stage.draw(image, rng) for _ in range(captions)]) for image in images]
        drawn.sort(key=lambda one: max(len(caption.split()) for caption in one[1]))
        batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
        rng.shuffle(batches)
        return stage, batches

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        stage, batches = together(step // _TOGETHER)
        rows = share.rows(batches[step % _TOGETHER])
        return stage.split.batch(
            [image for image, _ in rows], [caption for _, told in rows for caption in told]
        )

    return batch_at
