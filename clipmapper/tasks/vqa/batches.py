"""Batches of questions about images, of records that have numbers and of records that come as a stream."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipmapper.data.answers import AnswerVocabulary, annotators, usual_answers
from clipmapper.data.records import Record, RecordData, RecordDataset
from clipmapper.data.tables.base import Records
from clipmapper.data.token_cache import TokenCache, TokenStore
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.batches import (
    Collate,
    ReadableItems,
    SplitBatches,
    different_images,
    epochs,
    shard_batches,
)
from clipmapper.training.processes import WHOLE, Share
from clipmapper.training.record_tokens import record_question_tokens

_KINDS_OF_ANSWERS = 4096  # whose targets are remembered: unanimous answers make up much of a data set


class VQACollate(Collate):
    """A batch of questions, as :class:`clipmapper.tasks.vqa.training.VQAModule` documents it."""

    def __init__(self, tokenize: Callable[[Sequence[str]], object], vocabulary: AnswerVocabulary) -> None:
        super().__init__(tokenize)
        self._targets = lru_cache(_KINDS_OF_ANSWERS)(vocabulary.targets)

    def without_images(self, records: Sequence[Record]) -> dict:
        return {"text": self.tokenize([record.question for record in records])} | self.without_inputs(records)

    def without_inputs(self, records: Sequence[Record]) -> dict:
        """Everything but ``images`` and ``text``."""
        return {
            "targets": torch.stack([self._targets(record.answers) for record in records]),
            "answers": [annotators(record.answers) for record in records],
            "families": [record.family for record in records],
            "ids": [record.id for record in records],
        }


class QuestionBatches(SplitBatches):
    """Batches of one split of ``data``, of which ``records`` are taken.

    With a ``store`` the encoder runs once over the split, otherwise in every step, and images are decoded
    whenever they are asked for. ``name``: of the split.
    """

    def __init__(
        self, model: CLIPmapper, data: RecordData, name: str, records: Records, store: TokenStore | None
    ) -> None:
        self.records, self.labelled_at_most, self.vocabulary = records, data.labelled_at_most, data.vocabulary
        reader = data.reader(model.encoder)
        self.dataset, self._images = RecordDataset(records, reader), records.images
        self.collate = VQACollate(partial(tokenize, model.encoder.tokenizer), data.vocabulary)
        self.cache: TokenCache | None = None
        if store is not None:
            self.cache = record_question_tokens(model.encoder, store, records, name, reader)

    def batch(self, questions: Tensor, shared: bool = False) -> dict:
        """A batch of these questions. ``shared``: an image that several of them ask about is in it once."""
        if self.cache is not None:
            return self.questions_only(questions) | {"image_tokens": self.cache.images(questions)}
        if not shared:
            return self.collate([self.dataset[int(number)] for number in questions])
        first, image_of = different_images(self._images, questions.tolist())
        return self.questions_only(questions) | {
            "images": torch.stack([self.dataset[row][1] for row in first]),
            "image_of": image_of,
            "image_names": [f"image {self._images[row]}" for row in first],
        }

    def questions_only(self, questions: Tensor) -> dict:
        """The same batch without its images."""
        records = [self.records[int(number)] for number in questions]
        if self.cache is None:
            return self.collate.without_images(records)
        return self.collate.without_inputs(records) | self.cache.texts(questions)

    def labelled_batch(self, rows: Sequence[int]) -> dict:
        return self.batch(torch.tensor(rows), shared=True)


class StreamedQuestions:
    """Batches of training questions that come as a stream. ``folder``: of the run."""

    def __init__(self, model: CLIPmapper, data: RecordData, seed: int, folder: Path) -> None:
        self.records = range(data.train_records)
        self.stream, self.seen = data.stream(seed), count()
        self.asked = data.stream(seed + 1)  # for what reads beside training: its place is its own
        self.items = ReadableItems(data.reader(model.encoder), data.on_bad_image, folder)
        self.collate = VQACollate(partial(tokenize, model.encoder.tokenizer), data.vocabulary)

    def batches(self, batch_size: int) -> Callable[[int, Share], dict]:
        """A share of the training batch of every step."""
        return shard_batches(self.stream, self.items, lambda items, step: self.collate(items), batch_size)

    def questions_only(self, questions: Tensor) -> dict:
        """As many of the next questions without their images: those of a stream have no numbers."""
        return self.collate.without_images(self.asked.batch(next(self.seen), len(questions)))


def question_batches(
    split: QuestionBatches, *, batch_size: int, seed: int, together: int = 1
) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step: every question once an epoch.

    ``together``: so many questions about an image are in one batch, and their image is encoded once.
    """
    numbers_at = epochs(len(split.records), batch_size, seed, split.records.images, together)
    return lambda step, share=WHOLE: split.batch(torch.tensor(share.rows(numbers_at(step))), together > 1)


def balanced_batches(split: QuestionBatches, *, batch_size: int, seed: int) -> Callable[[int, Share], dict]:
    """A share of the batch of every step, in which every answer of the data is asked for equally often.

    Drawn by (seed, step), with replacement: an answer, and one of the questions that most people gave it to.
    Questions whose usual answer the model does not know are not asked.
    """
    usual = usual_answers(split.records, split.vocabulary)
    order = np.argsort(usual, kind="stable")[(usual < 0).sum() :]
    answers, first, count = np.unique(usual[order], return_index=True, return_counts=True)

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        rng = np.random.default_rng((seed, step))
        drawn = rng.integers(len(answers), size=batch_size)
        places = first[drawn] + (rng.random(batch_size) * count[drawn]).astype(np.int64)
        return split.batch(torch.tensor(share.rows(order[places].tolist())))

    return batch_at


def drawn_batches(
    simple: QuestionBatches,
    full: QuestionBatches,
    *,
    batch_size: int,
    simple_steps: int,
    first_families: Sequence[str],
    first_steps: int,
    shares: Mapping[str, float],
    told_by_size: float,
    seed: int,
) -> Callable[[int, Share], dict]:
    """A share of the batch of every step: simple scenes first, then all; drawn by (seed, step).

    Families are drawn as often as their ``shares`` say; in the first ``first_steps`` only ``first_families``.
    ``told_by_size``: within a family that has such, the share of questions about one of two objects that only
    their size tells apart.
    """
    numbers = {id(split): _numbers_by_family(split.records) for split in (simple, full)}

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        source = simple if step < simple_steps else full
        of_family = numbers[id(source)]
        asked = [f for f in first_families if f in of_family] if step < first_steps else []
        asked = asked or list(of_family)
        weights = np.array([shares[family] for family in asked])
        if not weights.any():  # the first families may be asked first and then never again
            weights = np.ones(len(asked))
        rng = np.random.default_rng((seed, step))
        drawn = rng.choice(len(asked), size=batch_size, p=weights / weights.sum())
        by_size = (rng.random(batch_size) < told_by_size).astype(int)
        questions = []
        for k, kind, place in zip(drawn, by_size, rng.random(batch_size), strict=True):
            kinds = of_family[asked[k]]
            some = kinds[kind] if len(kinds[kind]) else kinds[1 - kind]
            questions.append(some[int(place * len(some))])
        return source.batch(torch.tensor(np.array(share.rows(questions))))

    return batch_at


def _numbers_by_family(records: Records) -> dict[str, tuple[list[int], list[int]]]:
    """The questions of every family that a size does not tell, and those that it tells."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for number, record in enumerate(records):
        found.setdefault(record.family, ([], []))[record.truth.told_by_size].append(number)
    return found
