"""Training batches from WebDataset shards, as a function of the step."""

from collections.abc import Callable, Sequence

from torch.utils.data import get_worker_info

from clipmapper.data.records import Item
from clipmapper.data.shard_stream import ShardStream
from clipmapper.training.processes import WHOLE, Share
from clipmapper.training.readable_items import ReadableItems


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
