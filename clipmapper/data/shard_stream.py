"""Reading WebDataset shards: every process and worker its own, from any position on."""

import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

from clipmapper.data.records import Record
from clipmapper.data.shard_files import INDEX, VERSION, Shard, records_of, webdataset
from clipmapper.errors import UserError


def read_index(path: str) -> dict:
    """``shards.json`` of a folder, or of an address (http, pipe:) that ``webdataset`` can open."""
    url = f"{path.rstrip('/')}/{INDEX}"
    try:
        with webdataset(".gopen").gopen(url) as stream:
            index = json.loads(stream.read())
        if index["version"] != VERSION:
            raise ValueError(f"it is of version {index['version']}, not {VERSION}; make the shards anew")
        return index | {
            "splits": {name: [Shard(**s) for s in shards] for name, shards in index["splits"].items()}
        }
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"data.path={path}: no readable {INDEX} of scripts/make_shards.py ({problem})"
        ) from problem


class ShardStream:
    """The records of a split's shards as endless streams that share them out.

    Stream ``index`` of ``of`` (a process's, or one of its workers') reads, in epoch e, every ``of``-th of the
    shards in an order drawn from (seed, e), and mixes records in a buffer of ``buffer`` of them. So in every
    epoch all streams together give each record once, and a stream is a function of its numbers alone: what
    comes at a position is the same after a resumption, for the same number of streams.

    ``path``: a folder or address. Raises ``UserError`` for fewer shards than streams: some would have nothing
    to read.
    """

    def __init__(self, path: str, shards: Sequence[Shard], *, buffer: int, seed: int) -> None:
        self.path, self.shards, self.buffer, self.seed = path.rstrip("/"), list(shards), buffer, seed
        self._open: dict[tuple[int, int], tuple[int, Iterator[Record]]] = {}

    def records(self, index: int = 0, of: int = 1, start: int = 0) -> Iterator[Record]:
        """The records of one stream from position ``start`` on, images not yet decoded.

        Epochs that lie before it are not read; of the one in which it lies, as much as comes before.
        """
        self.check_readers(of)
        for epoch in count():
            mine = self.epoch_shards(epoch, index, of)
            records = sum(shard.records for shard in mine)
            if start >= records:
                start -= records
                continue
            yield from islice(self._epoch(mine, epoch), start, None)
            start = 0

    def check_readers(self, of: int) -> None:
        """Raises ``UserError`` for fewer shards than streams."""
        if of > len(self.shards):
            raise UserError(
                f"data.path={self.path}: {len(self.shards)} shards cannot be shared among {of} readers "
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

    def epoch_shards(self, epoch: int, index: int, of: int) -> list[Shard]:
        order = list(self.shards)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order[index::of]

    def _epoch(self, shards: Sequence[Shard], epoch: int) -> Iterator[Record]:
        # webdataset's detshuffle counts its epochs from the one that it is given.
        mixing = webdataset().detshuffle(self.buffer, self.buffer, seed=self.seed, epoch=epoch - 1)
        return mixing.run(in_order(self.path, shards))


def _streamed(url: str) -> Iterator[dict]:
    with webdataset(".gopen").gopen(url) as opened:  # webdataset itself leaves files open
        tar = webdataset(".tariterators")
        yield from tar.group_by_keys(tar.tar_file_expander([{"url": url, "stream": opened}]))


def in_order(
    path: str, shards: Sequence[Shard], samples: Callable[[str], Iterator[dict]] = _streamed
) -> Iterator[Record]:
    """All records of some shards, in order. Raises ``UserError`` for a shard that is damaged or not there.

    ``samples``: of a shard, by its address.
    """
    for shard in shards:
        found = 0
        try:
            for sample in samples(f"{path.rstrip('/')}/{shard.name}"):
                for record in records_of(sample):
                    found += 1
                    yield record
        except (OSError, tarfile.TarError, EOFError, ValueError) as problem:
            # webdataset puts its stream behind the arguments of an exception.
            reason = problem.strerror if isinstance(problem, OSError) else problem.args[0]
            raise UserError(f"{path}/{shard.name}: not a readable shard ({reason})") from problem
        if found != shard.records:
            raise UserError(
                f"{path}/{shard.name}: {found} records, {INDEX} says {shard.records}; it was cut off"
            )
