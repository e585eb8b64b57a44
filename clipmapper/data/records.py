"""Data sets of records, and batches made of records."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from clipmapper.data.answers import ACCURACIES, AnswerVocabulary, annotators
from clipmapper.data.record import OTHER, Record, StoredImage
from clipmapper.data.tables.builder import tables_of
from clipmapper.data.tables.columns import RecordTable
from clipmapper.errors import UserError

__all__ = [
    "OTHER",
    "CaptionCollate",
    "Item",
    "Record",
    "RecordData",
    "RecordDataset",
    "StoredImage",
    "VQACollate",
    "check_task",
]


class RecordDataset(Dataset):
    """Records with their images as the encoder reads them.

    ``reader``: a :class:`clipmapper.data.pixels.PixelReader`. An item is (record, pixels); a list of them
    goes into :class:`VQACollate` or :class:`CaptionCollate`. Raises ``UserError`` for an unreadable image.
    """

    def __init__(
        self, records: Sequence[Record], reader: Callable[[Record], UInt8[Tensor, "3 height width"]]
    ) -> None:
        self.records, self.reader = records, reader

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> "Item":
        record = self.records[number]
        return record, self.reader(record)


Item = tuple[Record, UInt8[Tensor, "3 height width"]]


class VQACollate:
    """A batch of questions, as :class:`clipmapper.tasks.vqa.training.VQAModule` documents it.

    ``tokenize``: texts → :class:`~clipmapper.models.tokens.TokenizedText`. The batch also has ``ids``.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], object], vocabulary: AnswerVocabulary) -> None:
        self.tokenize, self.vocabulary = tokenize, vocabulary

    def __call__(self, items: Sequence[Item]) -> dict:
        batch = self.without_images([record for record, _ in items])
        return batch | {"images": torch.stack([pixels for _, pixels in items])}

    def without_images(self, records: Sequence[Record]) -> dict:
        """Everything but ``images``."""
        return {
            "text": self.tokenize([record.question for record in records]),
            "targets": torch.stack([self.vocabulary.targets(record.answers) for record in records]),
            "answers": [annotators(record.answers) for record in records],
            "families": [record.family for record in records],
            "ids": [record.id for record in records],
        }


class CaptionCollate:
    """A batch of images with one caption each, as :class:`clipmapper.tasks.captioning.training.CaptionModule`
    documents it.

    ``tokenize``: captions → :class:`~clipmapper.models.tokens.TokenizedText`. The batch also has ``ids``.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], object]) -> None:
        self.tokenize = tokenize

    def __call__(self, items: Sequence[Item], captions: Sequence[str]) -> dict:
        batch = self.without_images([record for record, _ in items], captions)
        return batch | {"images": torch.stack([pixels for _, pixels in items])}

    def without_images(self, records: Sequence[Record], captions: Sequence[str]) -> dict:
        """Everything but ``images``."""
        return {
            "text": self.tokenize(captions),
            "references": [list(record.captions) for record in records],
            "ids": [record.id for record in records],
        }


class RecordData:
    """A data set of records that training can take: what ``data._target_`` builds.

    Parameters
    ----------
    splits : name → records, kept as tables (:class:`clipmapper.data.tables.columns.RecordTable`); "train" and
        "validation" at least, each not empty, "test" where there is one.
    vocabulary : the answers that the model is to know; None for captions.
    accuracy : how answers are scored, a key of :data:`clipmapper.data.answers.ACCURACIES`.
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    workers : processes that decode images, 0 for none.
    notes : lines that the run prints about the data (images left out, answers unknown to the vocabulary).
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Record]],
        vocabulary: AnswerVocabulary | None,
        *,
        accuracy: str = "vqa",
        decoding: str = "fast",
        workers: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        self.accuracy = ACCURACIES[accuracy]
        self.splits = tables_of(splits)
        self.vocabulary = vocabulary
        self.decoding = decoding
        self.workers = workers
        self.notes = list(notes)

    @property
    def task(self) -> str:
        """ "vqa" or "captioning"."""
        return "captioning" if self.vocabulary is None else "vqa"

    def split(self, name: str) -> RecordTable:
        """Raises ``UserError`` for a split that is not there."""
        if name not in self.splits:
            raise UserError(f"split={name}: the data has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def train(self) -> RecordTable:
        return self.splits["train"]

    @property
    def validation(self) -> RecordTable:
        return self.splits["validation"]

    @property
    def answers(self) -> tuple[str, ...]:
        return () if self.vocabulary is None else self.vocabulary.answers

    @property
    def families(self) -> tuple[str, ...]:
        """Of all splits that are scored, in alphabetical order."""
        return tuple(self.validation.family_counts())

    def wordings(self) -> Iterator[str]:
        """All captions: those of validation are scored by the head, so it must know their words too."""
        return (caption for some in self.splits.values() for told in some.captions() for caption in told)

    def summary(self) -> list[str]:
        """What a run says about its data, before it begins."""
        lines = []
        for name, records in self.splits.items():
            images = len(np.unique(records.images))
            if self.vocabulary is None:
                what = f"{records.lengths('captions').sum()} captions"
            else:
                what = f"{len(records)} questions"
            lines.append(f"{name}: {images} images, {what}")
        if self.vocabulary is not None:
            lines.append(f"{len(self.answers)} answers")
        return lines + self.notes


def check_task(data: RecordData, task: str) -> None:
    """Raise ``UserError`` where training is for the other task than the data."""
    if data.task != task:
        has, lacks, choose = ("captions", "questions", "experiment=caption_manifest, or training=captioning "
            "with a captioner as model") if data.task == "captioning" else ("questions", "captions",
            "training=vqa and a model that answers")  # fmt: skip
        raise UserError(f"data: it has {has} and no {lacks}, but training is for {task}; choose {choose}")
