"""A data set in WebDataset shards, as training takes it: ``data=shards``."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import Record, RecordData
from clipmapper.data.shard_stream import ShardStream, in_order, read_index
from clipmapper.errors import UserError


class ShardData(RecordData):
    """What ``scripts/make_shards.py`` wrote: training records as a stream, the others by number.

    Parameters
    ----------
    path : the folder, or an address that ``webdataset`` opens. Images of the validation and test splits are
        read from a folder when they are needed; from an address they are kept in memory.
    buffer : how many training records are mixed; their encoded images are in memory, in each worker.
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    workers : processes that read and decode, 0 for none.

    ``splits`` lacks "train", which :meth:`stream` gives. Raises ``UserError`` for shards that are damaged or
    not there (of the training ones only the latter, and only in a folder).
    """

    def __init__(self, path: str, *, buffer: int, decoding: str = "fast", workers: int = 0) -> None:
        index = read_index(path)
        self.path, self.buffer, self.shards = path, buffer, index["splits"]
        self.words = index["words"]
        vocabulary = None if index["answers"] is None else AnswerVocabulary(index["answers"], index["rule"])
        missing = [
            s.name for s in self.shards["train"] if self._local and not (Path(path) / s.name).is_file()
        ]
        if missing:
            raise UserError(
                f"data.path={path}: {len(missing)} shards are not there; the first is {missing[0]}"
            )
        others = {name: list(self.records(name)) for name in self.shards if name != "train"}
        super().__init__(others, vocabulary, accuracy=index["accuracy"], decoding=decoding, workers=workers)

    @property
    def train_records(self) -> int:
        """How many records an epoch has."""
        return sum(shard.records for shard in self.shards["train"])

    def stream(self, seed: int) -> ShardStream:
        """The training records, in an order drawn by ``seed``."""
        return ShardStream(self.path, self.shards["train"], buffer=self.buffer, seed=seed)

    def records(self, split: str) -> Iterator[Record]:
        """All records of a split in order, without holding the images of a folder's shards."""
        samples = {"samples": _located} if self._local else {}
        return in_order(self.path, self.shards[split], **samples)

    def wordings(self) -> list[str]:
        """Each word of all captions once, in their place."""
        return self.words

    def summary(self) -> list[str]:
        train = self.shards["train"]
        what = "images with captions" if self.vocabulary is None else "questions"
        images = sum(shard.images for shard in train)
        return [
            f"train: {images} images, {self.train_records} {what}, in {len(train)} shards",
            *super().summary(),
        ]

    @property
    def _local(self) -> bool:
        return Path(self.path).is_dir()


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image file inside a tar file."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded file. Raises ``UserError`` where the shard has gone."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.shard}: {error.strerror}") from error


def _located(shard: str) -> Iterator[dict]:
    """Samples as ``webdataset`` reads them, with where the image is in place of its bytes."""
    samples: dict[str, dict] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            sample = samples.setdefault(key, {"__url__": shard, "__key__": key})
            if suffix == "json":
                sample[suffix] = tar.extractfile(member).read()
            else:
                sample[suffix] = ShardImage(Path(shard), member.offset_data, member.size)
    yield from samples.values()
