"""Batches of records: questions or captions about images that are files."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import CaptionCollate, Record, RecordDataset, VQACollate
from clipmapper.data.tables.builder import as_table
from clipmapper.data.tokens.cache import TokenCache, TokenStore
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.tokens import caption_tokens
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.processes import WHOLE, Share, batches_of
from clipmapper.training.record_tokens import record_image_tokens, record_question_tokens

# Photographs in a batch of validation: of 224 x 224 pixels they take 77 MB.
_LABELLED = 128
_LARGEST = 640  # pixels of the longer side of what is looked at


@dataclass(frozen=True)
class QuestionRecords:
    """A split of questions. ``questions`` know their text as ``question`` and have a ``family``."""

    questions: Sequence[Record]

    def __len__(self) -> int:
        return len(self.questions)

    def family_counts(self) -> dict[str, int]:
        """How many questions of each family there are."""
        return as_table(self.questions).family_counts()


class _References(Sequence[Sequence[str]]):
    """The captions of records, read when they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sequence[str]:
        return self.records[number].captions


@dataclass(frozen=True)
class CaptionRecords:
    """A split of images with captions. ``truth``: nobody knows whether a caption is so."""

    records: Sequence[Record]
    truth: None = None

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def references(self) -> Sequence[Sequence[str]]:
        return _References(self.records)

    def draw(self, image: int, rng: random.Random) -> str:
        """A caption to train on."""
        return rng.choice(self.records[image].captions)


class RecordQuestions:
    """Batches of one split of questions.

    With a ``store`` the encoder runs once over the split, otherwise in every step, and images are decoded
    whenever they are asked for. ``name``: of the split. ``decoding``: of the data.
    """

    labelled_at_most = _LABELLED

    def __init__(
        self,
        model: CLIPmapper,
        records: Sequence[Record],
        vocabulary: AnswerVocabulary,
        name: str,
        store: TokenStore | None,
        decoding: str = "fast",
    ) -> None:
        self.split = QuestionRecords(records)
        reader = model.encoder.reader(decoding)
        self.dataset = RecordDataset(records, reader)
        self.collate = VQACollate(partial(tokenize, model.encoder.tokenizer), vocabulary)
        self.cache: TokenCache | None = None
        if store is not None:
            self.cache = record_question_tokens(model.encoder, store, records, name, reader)

    def batch(self, questions: Tensor) -> dict:
        """A batch of these questions (see :class:`clipmapper.tasks.vqa.training.VQAModule`)."""
        if self.cache is not None:
            return self.questions_only(questions) | {"image_tokens": self.cache.images(questions)}
        return self.collate([self.dataset[int(number)] for number in questions])

    def questions_only(self, questions: Tensor) -> dict:
        """The same batch without its images."""
        batch = self.collate.without_images([self.dataset.records[int(number)] for number in questions])
        if self.cache is None:
            return batch
        del batch["text"]
        return batch | self.cache.texts(questions)

    def labelled(self, batch_size: int, share: Share = WHOLE) -> Iterator[dict]:
        """A share of all questions in order, with what validation needs."""
        for rows in _in_order(len(self.split), batch_size, share):
            yield self.batch(torch.tensor(rows))


class RecordCaptions:
    """Batches of one split of images with captions.

    ``name``, ``store``, ``decoding``: as of :class:`RecordQuestions`.
    """

    labelled_at_most = _LABELLED

    def __init__(
        self,
        model: Captioner,
        records: Sequence[Record],
        name: str,
        store: TokenStore | None,
        decoding: str = "fast",
    ) -> None:
        self.split = CaptionRecords(records)
        reader = model.encoder.reader(decoding)
        self.dataset = RecordDataset(records, reader)
        self.collate = CaptionCollate(partial(caption_tokens, model.tokenizer, model.ends))
        self.image_tokens: Tensor | None = None
        if store is not None:
            self.image_tokens, self.image_of = record_image_tokens(
                model.encoder, store, records, name, reader
            )

    def batch(self, images: Sequence[int], captions: Sequence[str]) -> dict:
        """A batch of these images, each with one caption (see :class:`CaptionModule`)."""
        if self.image_tokens is not None:
            batch = self.collate.without_images([self.split.records[number] for number in images], captions)
            return batch | {"image_tokens": self.image_tokens[self.image_of[list(images)]].float()}
        return self.collate([self.dataset[number] for number in images], captions)

    def labelled(self, batch_size: int, share: Share = WHOLE) -> Iterator[dict]:
        """A share of all images in order, with their numbers; the caption is the first."""
        for rows in _in_order(len(self.split), batch_size, share):
            captions = [self.split.records[number].captions[0] for number in rows]
            yield self.batch(rows, captions) | {"numbers": list(rows)}

    def picture(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image to be looked at, whole and upright."""
        found = self.split.records[image].pil()
        found.thumbnail((_LARGEST, _LARGEST))
        return np.asarray(found)


def epochs(count: int, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """The numbers in the batch of every step: each of ``count`` once an epoch, in an order of its own."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def numbers_at(step: int) -> list[int]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(order(place // count)[place % count]) for place in places]

    return numbers_at


def question_batches(split: RecordQuestions, *, batch_size: int, seed: int) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step."""
    numbers_at = epochs(len(split.split), batch_size, seed)
    return lambda step, share=WHOLE: split.batch(torch.tensor(share.rows(numbers_at(step))))


def _in_order(count: int, batch_size: int, share: Share) -> Iterator[range]:
    """Rows of batches; in a worker of a ``DataLoader``, which takes batches from its workers in turn, every
    so many of them."""
    worker = get_worker_info()
    first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
    yield from islice(batches_of(count, min(batch_size, _LABELLED), share), first, None, stride)
