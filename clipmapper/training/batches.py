"""Batches: which samples are in that of every step and in those of a validation, also of a stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clipmapper.data.records import Item, Record, RecordData, RecordDataset
from clipmapper.data.shards.data import ShardStream
from clipmapper.errors import UserError
from clipmapper.training.processes import WHOLE, Share, batch_count, batches_of


def epochs(
    count: int, batch_size: int, seed: int, images: np.ndarray | None = None, together: int = 1
) -> Callable[[int], list[int]]:
    """The numbers in the batch of every step: each of ``count`` once an epoch, in an order of its own.

    ``images``: the image of each, of which up to ``together`` records then come one behind the other.
    """

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        drawn = rng.permutation(count)
        return drawn if images is None or together == 1 else _in_groups(drawn, images, together, rng)

    def numbers_at(step: int) -> list[int]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(order(place // count)[place % count]) for place in places]

    return numbers_at


def _in_groups(drawn: np.ndarray, images: np.ndarray, together: int, rng: np.random.Generator) -> np.ndarray:
    """The same numbers, those of an image in groups of ``together`` (its last may be smaller), groups in any
    order."""
    by_image = drawn[np.argsort(images[drawn], kind="stable")]
    _, first, count = np.unique(images[by_image], return_index=True, return_counts=True)
    begins = np.zeros(len(by_image), bool)  # a group
    for place in range(0, int(count.max()), together):
        begins[first[count > place] + place] = True
    group = np.cumsum(begins) - 1
    return by_image[np.argsort(rng.permutation(group[-1] + 1)[group], kind="stable")]


def different_images(images: np.ndarray, rows: Sequence[int]) -> tuple[list[int], Tensor]:
    """Of the records ``rows`` the first with each image, and which of those images each of the rows has.

    ``images``: the image of every record.
    """
    _, first, image_of = np.unique(images[list(rows)], return_index=True, return_inverse=True)
    return [int(rows[place]) for place in first], torch.from_numpy(image_of)


def in_order(count: int, batch_size: int, share: Share) -> Iterator[range]:
    """The rows of batches; in a worker of a ``DataLoader``, which takes batches from its workers in turn,
    every so many of them."""
    worker = get_worker_info()
    first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
    yield from islice(batches_of(count, batch_size, share), first, None, stride)


LEFT_OUT = "left_out.txt"
_TRIED = 1000  # unreadable images in a row


class SplitBatches(ABC):
    """A split in batches, of at most ``labelled_at_most`` where it is taken in order."""

    records: Sequence[Record]
    labelled_at_most = RecordData.labelled_at_most

    @abstractmethod
    def labelled_batch(self, rows: Sequence[int]) -> dict:
        """These records with what validation needs."""

    def labelled(self, batch_size: int | None = None, share: Share = WHOLE) -> Iterator[dict]:
        """A share of all records in order."""
        size = min(batch_size or self.labelled_at_most, self.labelled_at_most)
        yield from map(self.labelled_batch, in_order(len(self.records), size, share))


class Collate(ABC):
    """A batch of records. ``tokenize``: texts → :class:`~clipmapper.models.tokens.TokenizedText`."""

    def __init__(self, tokenize: Callable[[Sequence[str]], object]) -> None:
        self.tokenize = tokenize

    def __call__(self, items: Sequence[Item], *texts: Sequence[str]) -> dict:
        batch = self.without_images([record for record, _ in items], *texts)
        return batch | {"images": torch.stack([pixels for _, pixels in items])}

    @abstractmethod
    def without_images(self, records: Sequence[Record], *texts: Sequence[str]) -> dict:
        """Everything but ``images``."""


class ReadableItems:
    """Decodes the images of training records that come as a stream, where nobody has looked at them before.

    ``on_bad_image``: "error" raises ``UserError`` with the shard and the name of the image; "skip" puts
    another record of the batch in its place, so that batches keep their size, and writes the name to
    ``folder/left_out.txt``, for all processes and workers of a run and across its resumptions.
    """

    def __init__(self, reader: Callable[[Record], Tensor], on_bad_image: str, folder: Path) -> None:
        self.reader, self.skip, self.file = reader, on_bad_image == "skip", folder / LEFT_OUT
        self._told: set[str] = set()

    def of(self, records: Sequence[Record], later: Callable[[], Iterator[Record]]) -> list[Item]:
        """As many items as records. ``later``: the records behind them, where none of a batch is readable."""
        found = [self._item(record) for record in records]
        if all(item is not None for item in found):
            return found
        readable = [item for item in found if item is not None]
        if not readable:
            tried = islice(later(), _TRIED)
            readable = list(islice(filter(None, map(self._item, tried)), 1))
        if not readable:
            raise UserError(
                f"data.on_bad_image=skip: none of {_TRIED:,} images in a row can be read; see {self.file}"
            )
        places = chain.from_iterable(iter(lambda: readable, None))
        return [next(places) if item is None else item for item in found]

    def _item(self, record: Record) -> Item | None:
        try:
            return RecordDataset([record], self.reader)[0]
        except UserError as error:
            if not self.skip:
                raise UserError(f"{error}; data.on_bad_image=skip leaves it out") from error
            if record.source not in self._told:
                self._told.add(record.source)
                with open(self.file, "a") as file:  # one write: lines of several processes do not mix
                    file.write(" ".join(str(error).split()) + "\n")
            return None


def left_out_lines(folder: Path) -> list[str]:
    """Lines about the images that a run has left out as unreadable, for its end."""
    file = folder / LEFT_OUT
    if not file.exists():
        return []
    lines = sorted(set(file.read_text().splitlines()))
    return [
        f"{len(lines)} unreadable training images were left out, such as {'; '.join(lines[:3])} (all: {file})"
    ]


def shard_batches(
    stream: ShardStream,
    items: ReadableItems,
    batch_of: Callable[[Sequence[Item], int], dict],
    batch_size: int,
) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step, made by ``batch_of`` from records of a stream with their
    images (``items``) and the step.

    Each share has a stream of its own, and each worker of its ``DataLoader`` one of that: worker w of W reads
    for the steps that it makes, of which every W-th is its own. Which stream a step reads from, and where, is
    known from the step, so that a run that is resumed at any step, with as many processes and workers, goes
    on with the very samples that it would have seen.
    """

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        size = len(share.rows(range(batch_size)))
        index, of = share.index * workers + step % workers, share.of * workers
        number = step // workers
        records = stream.batch(number, size, index, of)
        return batch_of(items.of(records, lambda: stream.records(index, of, (number + 1) * size)), step)

    return batch_at


class StepBatches(IterableDataset):
    """Training batches as a function of the step: a resumed run sees what an uninterrupted one would.

    ``batch_at(step, share)`` makes a share of the batch of a step: that of this process, in as many parts as
    gradients are accumulated over. ``terms``: of :class:`TaskModule`.
    """

    def __init__(
        self,
        batch_at: Callable[[int, Share], dict],
        first_step: int,
        max_steps: int,
        share: Share = WHOLE,
        accumulated: int = 1,
        terms: Callable[[dict], int | float] = lambda batch: len(batch["ids"]),
    ) -> None:
        self.batch_at, self.first_step, self.max_steps = batch_at, first_step, max_steps
        self.terms = terms
        self.shares = [share.part(index, accumulated) for index in range(accumulated)]

    def __iter__(self) -> Iterator[dict]:
        # A DataLoader takes batches from its workers in turn: of all parts each worker makes every so many.
        # (A step of several parts is made by as many workers, because each part has to know all terms.)
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        made, parts = None, []
        for item in range(first, (self.max_steps - self.first_step) * len(self.shares), stride):
            step, index = divmod(item, len(self.shares))
            if step != made:
                made, parts = step, [self.batch_at(self.first_step + step, share) for share in self.shares]
            yield parts[index] | {"parts": len(parts), "parts_terms": sum(map(self.terms, parts))}


class Labelled(IterableDataset):
    """A share of a split in order, in batches with what validation needs."""

    def __init__(self, split: SplitBatches, share: Share = WHOLE) -> None:
        self.split, self.share = split, share

    def batches(self) -> int:
        """How many there are."""
        return batch_count(len(self.split.records), self.split.labelled_at_most, self.share)

    def __iter__(self) -> Iterator[dict]:
        return self.split.labelled(share=self.share)
