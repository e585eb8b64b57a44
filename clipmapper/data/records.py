"""Data sets of records, and batches made of records."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Num
from torch import Tensor, nn
from torch.utils.data import Dataset

from clipmapper.data.answers import ACCURACIES, AnswerVocabulary
from clipmapper.data.pixels import PixelReader
from clipmapper.data.record import OTHER, Record, StoredImage
from clipmapper.data.tables.base import Records
from clipmapper.data.tables.builder import tables_of
from clipmapper.errors import UserError

__all__ = [
    "OTHER",
    "Item",
    "Record",
    "RecordData",
    "RecordDataset",
    "StoredImage",
]


class RecordDataset(Dataset):
    """Records with their images as the encoder reads them.

    ``reader``: a :class:`clipmapper.data.pixels.PixelReader`. An item is (record, pixels). Raises
    ``UserError`` for an unreadable image.
    """

    def __init__(
        self, records: Sequence[Record], reader: Callable[[Record], Num[Tensor, "3 height width"]]
    ) -> None:
        self.records, self.reader = records, reader

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> "Item":
        record = self.records[number]
        return record, self.reader(record)


Item = tuple[Record, Num[Tensor, "3 height width"]]


class RecordData:
    """A data set of records that training can take: what ``data._target_`` builds.

    Parameters
    ----------
    splits : name → records, kept as tables (:class:`clipmapper.data.tables.columns.RecordTable`), none
        of them empty; "train" and "validation" where something is to be trained.
    vocabulary : the answers that the model is to know; None for captions.
    accuracy : how answers are scored, a key of :data:`clipmapper.data.answers.ACCURACIES`.
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    workers : processes that decode images, 0 for none.
    augment : how images of training are altered, one of
        :data:`clipmapper.data.augment.AUGMENT`; no others ever are.
    notes : lines that the run prints about the data (images left out, answers unknown to the vocabulary).

    ``validation_splits`` are scored in every validation, at most ``labelled_at_most`` records in a batch.
    ``chance``: accuracy of guessing in each family, where it is known. ``stream``: None, or, of data whose
    training records have no numbers, what gives them in an order drawn by a seed.
    """

    validation_splits: tuple[str, ...] = ("validation",)
    labelled_at_most = 128  # photographs: of 224 x 224 pixels they take 77 MB
    chance: Mapping[str, float] = {}
    stream = None
    drawn_anew = False  # whenever it is needed: nothing of it need be kept

    def __init__(
        self,
        splits: Mapping[str, Sequence[Record]],
        vocabulary: AnswerVocabulary | None,
        *,
        accuracy: str = "vqa",
        decoding: str = "fast",
        workers: int = 0,
        augment: str = "none",
        notes: Sequence[str] = (),
    ) -> None:
        self.accuracy = ACCURACIES[accuracy]
        self.splits = tables_of(splits)
        self.vocabulary = vocabulary
        self.decoding = decoding
        self.workers = workers
        self.augment = augment
        self.notes = list(notes)

    @property
    def kind(self) -> str:
        """ "questions" or "captions": what every record has."""
        return "captions" if self.vocabulary is None else "questions"

    def reader(self, encoder: nn.Module) -> Callable[[Record], Tensor]:
        """Reads the images of records for the image tower of a
        :class:`~clipmapper.models.encoder.ClipEncoder`; its ``many`` those of several."""
        return PixelReader(encoder.clip.visual.preprocess_cfg, self.decoding)

    def split(self, name: str) -> Records:
        """Raises ``UserError`` for a split that is not there."""
        if name not in self.splits:
            raise UserError(f"split={name}: the data has {', '.join(self.splits)}")
        return self.splits[name]

    def check_training(self, where: str) -> None:
        """Raise ``UserError`` where there is nothing to train on. ``where``: who asks."""
        if self.stream is None and not len(self.splits.get("train", ())):
            raise UserError(
                f"{where}: nothing to train on; the data has {', '.join(self.splits)} and no train"
            )

    @property
    def train(self) -> Records:
        return self.splits["train"]

    @property
    def validation(self) -> Records:
        return self.splits["validation"]

    @property
    def answers(self) -> tuple[str, ...]:
        return () if self.vocabulary is None else self.vocabulary.answers

    @property
    def families(self) -> tuple[str, ...]:
        """The families of all splits that are scored, in alphabetical order."""
        return tuple(self.validation.family_counts())

    def wordings(self) -> Iterator[str]:
        """All captions: those of validation are scored by the head, so it must know their words too."""
        return (caption for some in self.splits.values() for told in some.captions() for caption in told)

    def summary(self) -> list[str]:
        """Lines that a run says about its data, before it begins."""
        lines = []
        for name, records in self.splits.items():
            images = len(np.unique(records.images))
            count = len(records) if self.kind == "questions" else records.lengths("captions").sum()
            lines.append(f"{name}: {images} images, {count} {self.kind}")
        if self.answers:
            lines.append(f"{len(self.answers)} answers")
        return lines + self.notes
