"""Training batches of a data set in shards."""

import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path

from torch import Tensor

from clipmapper.data.records import CaptionCollate, Item, VQACollate
from clipmapper.data.shards.data import ShardData
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.tokens import caption_tokens
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.processes import Share, this_share
from clipmapper.training.record_batches import CaptionRecords
from clipmapper.training.streamed import ReadableItems, shard_batches


def check_readers(data: ShardData, accumulated: int) -> None:
    """Raises ``UserError`` where there are fewer shards than readers, before training."""
    data.stream(0).check_readers(this_share().of * accumulated * max(data.workers, 1))


class StreamedQuestions:
    """Batches of the training questions. ``split`` knows how many there are. ``folder``: of the run."""

    def __init__(self, model: CLIPmapper, data: ShardData, seed: int, folder: Path) -> None:
        self.split = range(data.train_records)
        self.stream, self.seen = data.stream(seed), count()
        self.asked = data.stream(seed + 1)  # for what reads beside training: its place is its own
        self.items = ReadableItems(model.encoder.reader(data.decoding), data.on_bad_image, folder)
        self.collate = VQACollate(partial(tokenize, model.encoder.tokenizer), data.vocabulary)

    def batches(self, batch_size: int) -> Callable[[int, Share], dict]:
        """A share of the training batch of every step."""
        return shard_batches(self.stream, self.items, lambda items, step: self.collate(items), batch_size)

    def questions_only(self, questions: Tensor) -> dict:
        """As many of the next questions without their images: those of a stream have no numbers."""
        return self.collate.without_images(self.asked.batch(next(self.seen), len(questions)))


class StreamedCaptions:
    """Batches of the training images with captions. ``folder``: of the run."""

    def __init__(self, model: Captioner, data: ShardData, seed: int, folder: Path) -> None:
        self.data, self.seed = data, seed
        self.items = ReadableItems(model.encoder.reader(data.decoding), data.on_bad_image, folder)
        self.collate = CaptionCollate(partial(caption_tokens, model.tokenizer, model.ends))

    @cached_property
    def split(self) -> CaptionRecords:
        """All of it, for what needs every caption (scst): it is read through once."""
        return CaptionRecords(self.data.every_training_record())

    def batches(self, batch_size: int, captions: int) -> Callable[[int, Share], dict]:
        """A share of the training batch of every step: each image with ``captions`` newly drawn captions."""

        def batch_of(items: Sequence[Item], step: int) -> dict:
            drawn = []
            for record, _ in items:
                rng = random.Random(f"captions/{self.seed}/{step}/{record.id}")
                drawn += [rng.choice(record.captions) for _ in range(captions)]
            return self.collate(items, drawn)

        return shard_batches(self.data.stream(self.seed), self.items, batch_of, batch_size)
