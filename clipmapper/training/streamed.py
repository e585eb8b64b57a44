"""Records with their images, where some of these can't be read."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from torch import Tensor
from torch.utils.data import get_worker_info

from clipmapper.data.records import Item, Record, RecordDataset
from clipmapper.data.shards.data import ShardStream
from clipmapper.errors import UserError
from clipmapper.training.processes import WHOLE, Share

LEFT_OUT = "left_out.txt"
_TRIED = 1000  # unreadable images in a row


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
