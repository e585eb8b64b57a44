"""Reading WebDataset shards: every process and worker its own, from any position on."""

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, islice

import numpy as np

from clipmapper.data.records import Record
from clipmapper.data.shards.files import webdataset
from clipmapper.data.shards.scan import ScannedShard
from clipmapper.errors import UserError


class ShardStream:
    """The records of a split's shards as endless streams that share them out.

    Stream ``index`` of ``of`` (a process's, or one of its workers') reads, in epoch e, every ``of``-th of the
    shards in an order drawn from (seed, e), and mixes records in a buffer of ``buffer`` of them. So in every
    epoch all streams together give each record once, and a stream is a function of its numbers alone: what
    comes at a position is the same after a resumption, for the same number of streams.

    What is mixed are numbers of records; a record is read when its turn comes. So nothing that lies before a
    position is read to begin there.

    ``where``: the name of the data in messages. Raises ``UserError`` for fewer shards than streams: some
    would have nothing to read.
    """

    def __init__(self, where: str, shards: Sequence[ScannedShard], *, buffer: int, seed: int) -> None:
        self.where, self.buffer, self.seed = where, buffer, seed
        self.shards = [shard for shard in shards if shard.records]
        self._open: dict[tuple[int, int], tuple[int, Iterator[Record]]] = {}

    def records(self, index: int = 0, of: int = 1, start: int = 0) -> Iterator[Record]:
        """The records of one stream from position ``start`` on, their images not yet read."""
        self.check_readers(of)
        for epoch in count():
            mine = self.epoch_shards(epoch, index, of)
            records = sum(shard.records for shard in mine)
            if start >= records:
                start -= records
                continue
            yield from self._epoch(mine, epoch, start)
            start = 0

    def check_readers(self, of: int) -> None:
        """Raises ``UserError`` for fewer shards than streams."""
        if of > len(self.shards):
            raise UserError(
                f"data.path={self.where}: {len(self.shards)} shards cannot be shared among {of} readers "
                "(processes x parts of a batch x data.workers); make more, smaller ones "
                "(--images-per-shard) or use fewer workers"
            )

    def batch(self, number: int, size: int, index: int = 0, of: int = 1) -> list[Record]:
        """Batch ``number`` of a stream, cheap for the batch behind the last that was asked for."""
        at, records = self._open.pop((index, of), (-1, iter(())))
        if at != number * size:
            records = self.records(index, of, number * size)
        found = list(islice(records, size))
        self._open[index, of] = ((number + 1) * size, records)
        return found

    def epoch_shards(self, epoch: int, index: int, of: int) -> list[ScannedShard]:
        order = list(self.shards)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order[index::of]

    def _epoch(self, shards: Sequence[ScannedShard], epoch: int, start: int) -> Iterator[Record]:
        # webdataset's detshuffle counts its epochs from the one that it is given.
        mixing = webdataset().detshuffle(self.buffer, self.buffer, seed=self.seed, epoch=epoch - 1)
        ends = list(accumulate(shard.records for shard in shards))
        for number in islice(mixing.run(iter(range(ends[-1]))), start, None):
            shard = int(np.searchsorted(ends, number, side="right"))
            yield shards[shard].record(number - ends[shard] + shards[shard].records)


def in_order(shards: Sequence[ScannedShard]) -> Iterator[Record]:
    """All records of some shards, in order, their images not yet read."""
    for shard in shards:
        yield from shard.every_record()
