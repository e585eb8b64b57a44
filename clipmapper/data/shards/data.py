"""A data set in WebDataset shards, as training takes it: ``data=shards``."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain, count, islice
from pathlib import Path

import numpy as np

from clipmapper.data.answers import AnswerVocabulary, frequent_answers, unknown_answers
from clipmapper.data.image_checks import readable_only
from clipmapper.data.record import stop_for
from clipmapper.data.records import Record, RecordData
from clipmapper.data.shards.index import (
    INDEX,
    Shard,
    ShardIndex,
    local,
    named_splits,
    read_index,
    tar_files,
    webdataset,
)
from clipmapper.data.shards.scan import Drawn, ScannedShard, places, scanned
from clipmapper.data.tables.builder import tables_of
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


class ShardData(RecordData):
    """Shards that ``scripts/make_shards.py`` or others (img2dataset) wrote: training records as a stream, the
    others by number.

    Parameters
    ----------
    path : a folder of tar files, one tar file, or several by a pattern in braces. Of a folder in which
        ``scripts/make_shards.py`` has left its ``shards.json`` everything else is known; otherwise:
    validation_path : the same, for validation. None: the files of ``path`` whose names say "val", or else a
        share of the images, ``validation_share``, each drawn with ``split_seed``.
    least_answers, targets, accuracy : as of :func:`clipmapper.data.readers.manifest.manifest_data`.
    buffer : how many training records are mixed, in each worker.
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    check : which images of the other splits are opened before training, as of ``manifest_data``.
    workers : processes that read and decode, 0 for none.
    augment : how images of training are altered, one of :data:`clipmapper.data.augment.AUGMENT`.
    on_bad_image : "error" or "skip": what is no sample (an image without text, a damaged file) is named, or
        left out and counted. Images of the other splits are decoded here, those of training while training.

    ``splits`` lacks "train", which :meth:`stream` gives. Raises ``UserError`` for shards that are damaged or
    not there.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        *,
        buffer: int,
        least_answers: int = 1,
        targets: str = "soft",
        accuracy: str = "vqa",
        validation_share: float = 0.1,
        split_seed: int = 0,
        on_bad_image: str = "error",
        decoding: str = "fast",
        check: str = "full",
        workers: int = 0,
        augment: str = "none",
    ) -> None:
        self.path, self.buffer, self.on_bad_image = path, buffer, on_bad_image
        folder = Path(local("data.path", path))
        index = read_index(folder) if folder.is_dir() else None
        notes: list[str] = []
        if index is not None:
            if validation_path is not None:
                raise UserError(f"data.validation_path: data.path={path} has its own validation ({INDEX})")
            self.shards, notes = _as_stated(folder, index, on_bad_image)
        else:
            self.shards, notes = _as_found(path, validation_path, validation_share, split_seed, on_bad_image)
        found = {name: list(in_order(some)) for name, some in self.shards.items() if name != "train"}
        others, more = readable_only(tables_of(found), on_bad_image, check=check)
        notes += more
        if index is not None:
            vocabulary = None if index.answers is None else AnswerVocabulary(index.answers, index.rule)
            accuracy, self.words = index.accuracy, list(index.words)
        else:
            vocabulary = _vocabulary(path, self.shards, least_answers, targets)
            self.words = [] if vocabulary else sorted(
                set(chain.from_iterable(s.words() for some in self.shards.values() for s in some))
            )  # fmt: skip
            if vocabulary:
                notes += unknown_answers(others["validation"], vocabulary)
        super().__init__(
            others,
            vocabulary,
            accuracy=accuracy,
            decoding=decoding,
            workers=workers,
            augment=augment,
            notes=notes,
        )

    @property
    def train_records(self) -> int:
        """How many records an epoch has."""
        return sum(shard.records for shard in self.shards["train"])

    def stream(self, seed: int) -> ShardStream:
        """The training records, in an order drawn by ``seed``."""
        return ShardStream(self.path, self.shards["train"], buffer=self.buffer, seed=seed)

    def every_training_record(self) -> list[Record]:
        """All of them in order, their images left in the shards."""
        return list(in_order(self.shards["train"]))

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


def _as_stated(
    folder: Path, index: ShardIndex, on_bad_image: str
) -> tuple[dict[str, list[ScannedShard]], list[str]]:
    """The shards of ``shards.json``, which must hold what it says."""
    stated = {split: [folder / shard.name for shard in shards] for split, shards in index.splits.items()}
    missing = [path.name for paths in stated.values() for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"data.path={folder}: {len(missing)} shards are not there; the first is {missing[0]}")
    shards = {split: scanned(paths, answered=split != "test") for split, paths in stated.items()}
    notes = _left_out(shards, on_bad_image)
    for split, found in shards.items():
        for shard, said in zip(found, index.splits[split], strict=True):
            _compare(shard, said)
        _no_key_twice(folder, found)
        if {shard.captioned for shard in found if shard.images} != {index.answers is None}:
            raise UserError(
                f"data.path={folder}: {INDEX} speaks of other data than the shards of {split} hold"
            )
    return shards, notes


def _compare(shard: ScannedShard, said: Shard) -> None:
    lost = len(shard.problems())
    for what, found, stated in (
        ("images", shard.images, said.images),
        ("records", shard.records, said.records),
    ):
        if found > stated or (found < stated and not lost):
            how = "it was cut off" if found < stated else "it is not the shard that was written"
            raise UserError(f"{shard.path}: {found} {what}, {INDEX} says {stated}; {how}")


def _no_key_twice(folder: Path, shards: Sequence[ScannedShard]) -> None:
    """scripts/make_shards.py numbers the images of a split: a key in two shards means a shard was copied."""
    keys = [shard.keys() for shard in shards]
    every, times = np.unique(np.concatenate(keys), return_counts=True)
    if (times > 1).any():
        key = every[times.argmax()]
        both = [shard.path.name for shard, own in zip(shards, keys, strict=True) if key in own]
        raise UserError(f"data.path={folder}: {both[0]} and {both[1]} hold the same image ({key})")


def _as_found(
    path: str, validation_path: str | None, share: float, seed: int, on_bad_image: str
) -> tuple[dict[str, list[ScannedShard]], list[str]]:
    """Shards without an index, as img2dataset leaves them."""
    files = named_splits("data.path", tar_files("data.path", path))
    if validation_path is not None:
        folder = Path(local("data.validation_path", validation_path))
        if folder.is_dir() and (folder / INDEX).exists():
            raise UserError(
                f"data.validation_path={folder}: shards with a {INDEX} are a data set of their own"
            )
        if "validation" in files:
            raise UserError(
                "data.validation_path: data.path has files whose names say validation; give one of them"
            )
        files["validation"] = tar_files("data.validation_path", validation_path)
        if both := {p.resolve() for p in files["train"]} & {p.resolve() for p in files["validation"]}:
            raise UserError(f"data.validation_path: {min(both).name} is among the files of data.path too")
    order = [name for name in ("train", "validation", "test") if name in files]
    shards = {name: _told_apart(scanned(files[name], answered=name != "test")) for name in order}
    notes = _left_out(shards, on_bad_image)
    if "validation" not in shards:
        whole = shards["train"]
        share = _share(whole, share, seed)
        shards["train"] = [shard.part(Drawn(False, share, seed)) for shard in whole]
        shards["validation"] = [shard.part(Drawn(True, share, seed)) for shard in whole]
        notes.append(f"validation: images of train, drawn by data.split_seed={seed}")
    for split, some in shards.items():
        if not sum(shard.records for shard in some):
            few = (
                "; give data.validation_path, or a larger data.validation_share"
                if split == "validation"
                else ""
            )
            raise UserError(f"data.path={path}: no image with a text for {split}{few}")
    kinds = {shard.captioned for some in shards.values() for shard in some if shard.images}
    if len(kinds) > 1:
        raise UserError(f"data.path={path}: questions in some shards and captions in others")
    return shards, notes


def _share(shards: Sequence[ScannedShard], share: float, seed: int) -> float:
    """``share``, or what puts one image at least on either side where there are two."""
    drawn = np.concatenate([places(shard.path.name, shard.images, seed) for shard in shards])
    if len(drawn) > 1 and not (drawn < share).any():
        return float(np.nextafter(drawn.min(), 1))
    return float(drawn.max()) if len(drawn) > 1 and (drawn < share).all() else share


def _told_apart(shards: Sequence[ScannedShard]) -> list[ScannedShard]:
    """Put the shard's name before ids, where several shards have a key."""
    keys = np.concatenate([shard.keys() for shard in shards])
    if len(np.unique(keys)) == len(keys):
        return list(shards)
    return [replace(shard, ids=f"{shard.path.stem}/") for shard in shards]


def _left_out(shards: dict[str, list[ScannedShard]], on_bad_image: str) -> list[str]:
    problems = [problem for some in shards.values() for shard in some for problem in shard.problems()]
    if on_bad_image == "error":
        stop_for(problems)
    if not problems:
        return []
    counts = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    first = "; ".join(str(problem) for problem in problems[:3])
    return [f"left out of the shards: {counts}, such as {first}"]


def _vocabulary(
    path: str, shards: dict[str, list[ScannedShard]], least: int, rule: str
) -> AnswerVocabulary | None:
    if any(shard.captioned for shard in shards["train"] if shard.images):
        return None
    counted = (answer for shard in shards["train"] for of_image in shard.counted() for answer in of_image)
    vocabulary = AnswerVocabulary(frequent_answers(counted, least), rule)
    if len(vocabulary) < 2:
        what = f"{len(vocabulary)} that occur {least} times (data.least_answers)"
        raise UserError(f"data.path={path}: fewer than two different answers in train: {what}")
    return vocabulary
