"""A trained model on the records of a split: what it says about each, in chunks."""

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Num
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmapper.data.content import content_digest
from clipmapper.data.records import Record, RecordData
from clipmapper.data.tables.base import RecordList, Records
from clipmapper.data.tables.columns import RecordTable, StoredBytes, together
from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole
from clipmapper.training.batches import different_images
from clipmapper.training.measures import Measures
from clipmapper.training.processes import WHOLE, Companions, another_has_failed, batches_of, this_share

ALL = "all"
_HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_WAIT = 0.2  # seconds between two looks for what other processes have done
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forwards:
    """How a model is run. ``precision``: as ``trainer.precision``. ``token_precision``: in which tokens of a
    frozen encoder are kept between the two stages, as ``training.token_precision``."""

    precision: str = "32-true"
    token_precision: str = "float16"


class Evaluation(ABC):
    """A model on records. What it says of one is plain, for JSON.

    ``file``: what the file of what was said is called. ``titles``: score → its title in tables, and what it
    is multiplied by there. ``noun``: of what is scored.
    """

    file: ClassVar[str]
    noun: ClassVar[str]
    titles: ClassVar[Mapping[str, tuple[str, int]]]

    def __init__(self, model: Any, data: RecordData, records: Records, forwards: Forwards) -> None:
        self.model, self.data, self.records, self.forwards = model, data, records, forwards
        self.reader = data.reader(model.encoder)
        self._images = records.images

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> dict:
        """What the model is given of these records; made in workers."""

    @abstractmethod
    def said(self, batch: Mapping) -> list:
        """What the model says of each record of a batch."""

    @abstractmethod
    def scored(self) -> np.ndarray:
        """Numbers of the records of which it is known what is right."""

    @abstractmethod
    def measures(self, said: Sequence) -> Measures:
        """Scores of the records that are scored; of the same groups and samples whatever is said."""

    @abstractmethod
    def write(self, said: Sequence, path: Path) -> Path:
        """Write what was said of all records in the official upload form."""

    def more(self, said: Sequence, confidence: float, seed: int) -> dict:
        """Whatever else is known about what was said, for ``results.json``."""
        return {}

    def shown(self, name: str, more: Mapping) -> Iterator[str | Table]:
        """:meth:`more` to be printed. ``name``: the model's."""
        yield from ()

    def pictures(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The different ``images`` of records, and which of them each record has."""
        first, image_of = different_images(self._images, rows)
        return {"images": self.reader.many([self.records[row] for row in first]), "image_of": image_of}

    def image_tokens(self, batch: Mapping) -> Float[Tensor, "batch tokens width"]:
        """Tokens of the image of every record, each image encoded once."""
        images: Num[Tensor, "images 3 height width"] = batch["images"].to(self.model.device)
        with self.first_stage():
            tokens = self.kept(self.model.encoder.image_tokens(images))
        return tokens[batch["image_of"].to(tokens.device)]

    @property
    def rounds(self) -> bool:
        """Whether a training run would have kept the encoder's tokens, and so rounded them."""
        return self.model.encoder.frozen

    def kept(self, tokens: Tensor) -> Tensor:
        """Tokens as a training run has them."""
        if not self.rounds or self.forwards.token_precision == "float32":
            return tokens
        return tokens.to(getattr(torch, self.forwards.token_precision)).float()

    def first_stage(self) -> AbstractContextManager:
        """Inside, the encoder runs in the precision in which training runs it."""
        return nullcontext() if self.rounds else self.second_stage()

    def second_stage(self) -> AbstractContextManager:
        """The same of what is behind the encoder."""
        half = _HALF.get(self.forwards.precision)
        return nullcontext() if half is None else torch.autocast(self.model.device.type, half)

    def digest(self, rows: Sequence[int]) -> str:
        """Another one for other records, or images that have changed (of files by size and time)."""
        digest = hashlib.blake2b(self.data.decoding.encode(), digest_size=16)
        for row in rows:
            record = self.records[row]
            told = [record.id, record.image_id, record.question, _image_identity(record)]
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()


def _image_identity(record: Record) -> list | str:
    image = record.image
    if isinstance(image, bytes):
        return content_digest(image)
    path = image.file if isinstance(image, StoredBytes) else image
    if not isinstance(path, Path):
        return ""  # an object's, which nothing but its name is known of
    try:
        found = os.stat(path)
    except OSError:  # whoever reads it says what is wrong
        return str(path)
    return [found.st_size, found.st_mtime_ns, getattr(image, "offset", 0)]


def records_of(data: RecordData, split: str) -> Records:
    """The records of a split, or of all splits one behind the other. Raises ``UserError`` where there is no
    such split."""
    if split != ALL:
        return data.split(split)
    parts = [data.splits[name] for name in data.splits]
    if all(isinstance(part, RecordTable) and part.columns is parts[0].columns for part in parts):
        return together(parts)
    return RecordList([record for part in parts for record in part])


class Chunks:
    """What a model says of all records, some batches at a time: a file each, which a later run takes again.

    Processes share them out in turn, and find those of others on the disk. ``key``: all that they depend on
    but the records. ``batch_size``: None: as validations of the data have it; batches are theirs, too.
    """

    def __init__(
        self, folder: Path, key: Mapping, evaluation: Evaluation, batch_size: int | None, chunk: int
    ) -> None:
        self.folder, self.evaluation = folder, evaluation
        self.key = json.dumps(key, sort_keys=True)
        size = batch_size or evaluation.data.labelled_at_most
        batches = list(batches_of(len(evaluation.records), size, WHOLE))
        together = max(1, chunk // size)
        self.chunks = [batches[start : start + together] for start in range(0, len(batches), together)]
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.chunks)

    def saved(self) -> int:
        """Of how many records it is on the disk what is said."""
        found = (self._entry(path) for path in self.folder.glob("chunk_*.json"))
        return sum(len(entry["said"]) for entry in found if entry["key"].startswith(self.key + " "))

    def share(self) -> int:
        """How many records are for this process to settle."""
        return sum(len(rows) for chunk in this_share().rows(self.chunks) for rows in chunk)

    def make(self, advance: Callable[[int], None]) -> None:
        """Settle this process's share of the chunks, as far as they are not there."""
        share = this_share()
        todo: list[int] = []
        for number in share.rows(range(len(self.chunks))):
            if self._found(number) is None:
                todo.append(number)
            else:
                advance(sum(map(len, self.chunks[number])))
        batches = [batch for number in todo for batch in self.chunks[number]]
        workers = self.evaluation.data.workers
        loading = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        loaded = iter(DataLoader(_Batches(self.evaluation, batches), batch_size=None, **loading))
        with torch.no_grad():
            for number in todo:
                said: list = []
                for rows in self.chunks[number]:
                    said += self.evaluation.said(next(loaded))
                    advance(len(rows))
                content = json.dumps({"key": self._key(number), "said": said}, allow_nan=False)
                write_whole(self._path(number), content, durable=False)

    def all(self, companions: Companions) -> list:
        """What is said of every record, when all processes have done their share.

        Raises ``UserError`` where one of them has ended before it has.
        """
        said: list = []
        for number in range(len(self.chunks)):
            while (found := self._found(number)) is None:
                if another_has_failed():
                    raise SystemExit(2)  # it has said why
                if (gone := companions.missing()) is not None:
                    raise UserError(f"{gone}, without its share of the work")
                time.sleep(_WAIT)
            said += found
        return said

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:05d}.json"

    def _key(self, number: int) -> str:
        rows = [row for batch in self.chunks[number] for row in batch]
        return f"{self.key} [{rows[0]}:{rows[-1] + 1}] {self.evaluation.digest(rows)}"

    def _found(self, number: int) -> list | None:
        path = self._path(number)
        if not path.exists():
            return None
        entry = self._entry(path)
        if not entry["key"]:
            _log.warning("%s is damaged and is computed again", path)
        rows = sum(map(len, self.chunks[number]))
        if entry["key"] != self._key(number) or len(entry["said"]) != rows:
            return None
        return entry["said"]

    @staticmethod
    def _entry(path: Path) -> dict:
        """What a file holds; an empty key where it is none of ours."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        fits = isinstance(found, dict) and isinstance(found.get("key"), str)
        if fits and isinstance(found.get("said"), list):
            return found
        return {"key": "", "said": []}


class _Batches(Dataset):
    def __init__(self, evaluation: Evaluation, batches: Sequence[range]) -> None:
        self.evaluation, self.batches = evaluation, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict:
        return self.evaluation.batch(self.batches[number])
