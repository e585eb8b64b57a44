"""Which questions are explained, and what is known about them."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from clipmapper.data.answers import AnswerVocabulary, normalised
from clipmapper.data.content import content_digest, joint_digest
from clipmapper.data.record import Truth
from clipmapper.data.records import RecordData
from clipmapper.data.tables.base import Records
from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.chosen import points
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.models.tokens import TokenizedText, tokenize, word_positions
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.explained import DRAWN_QUESTIONS, Samples, looked_at, mask_of, others_of

_Mask = Bool[np.ndarray, "_ _"] | None


@dataclass(frozen=True)
class QuestionSamples(Samples):
    """Questions to be explained.

    ``pictures`` are what the model sees, as a reader is to see it; ``targets`` are the soft accuracies of
    every answer. ``masks`` (pixels that decide the answer) and ``deciding`` (words that do, per word of the
    question) have None for a question of which that is not known; so has ``known``, what the data set knows.
    ``all_images`` and ``all_text`` are those of the samples that ``others`` names.
    """

    of_all = ("all_images", "all_text")

    ids: Sequence[int]
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    images: Float[Tensor, "samples 3 model_height model_width"]
    text: TokenizedText
    questions: Sequence[str]
    truths: Sequence[str]
    families: Sequence[str]
    targets: Float[Tensor, "samples answers"]
    masks: Sequence[_Mask]
    deciding: Sequence[Sequence[bool] | None]
    known: Sequence[Truth | None]
    others: Sequence[int]
    all_images: Float[Tensor, "all 3 model_height model_width"]
    all_text: TokenizedText

    def digest(self) -> str:
        return joint_digest(
            [
                content_digest(self.images.cpu().numpy()),
                content_digest(self.targets.cpu().numpy()),
                content_digest(json.dumps([self.ids, self.questions, self.truths, self.families]).encode()),
            ]
        )

    def points(self, methods: int, scores: Sequence[str]) -> int:
        return sum(points(score, len(self), methods, MODALITIES) for score in scores)

    def undecided(self) -> int:
        return sum(
            mask is None or words is None or not any(words)
            for mask, words in zip(self.masks, self.deciding, strict=True)
        )

    def note(self) -> str | None:
        """A line about questions none of whose answers the model can give."""
        found = int((self.targets.sum(1) == 0).sum())
        if found == len(self):
            raise UserError(
                f"data: none of the answers to these {found} questions is one that the model can give, such "
                f"as {self.truths[0]!r}; choose the data that it was trained on, or like them"
            )
        if not found:
            return None
        return (
            f"{found} of {len(self)} questions have no answer that the model can give: none is right for them"
        )


def question_samples(
    model: CLIPmapper, data: RecordData, split: str, count: int, seed: int
) -> QuestionSamples:
    """``count`` questions of a split, the families in equal shares, drawn by ``seed``.

    Scores are of the answers that the model can give, which need not be those of the data. Questions whose
    deciding pixels cannot be seen are left out.
    """
    records = data.split(split)
    if not records.lengths("answers").any():
        raise UserError(f"split={split}: its questions have no answers")
    visual = model.encoder.clip.visual
    chosen = _chosen(records, visual, count, seed)
    if not chosen:
        raise UserError(f"split={split}: the deciding pixels of none of its questions can be seen (mask)")
    asked = [records[number] for number, _ in chosen]
    pictures, images = looked_at(asked, data.reader(model.encoder), visual)
    vocabulary = AnswerVocabulary(model.answers, data.vocabulary.rule)
    tokenizer = model.encoder.tokenizer
    text = tokenize(tokenizer, [record.question for record in asked])
    deciding: list[list[bool] | None] = []
    for row, record in enumerate(asked):
        if record.truth is None or record.truth.words is None:
            deciding.append(None)
            continue
        words = word_positions(tokenizer, text.ids[row], text.removable[row])
        deciding.append([word in record.truth.words for word, _ in words])
    return QuestionSamples(
        ids=[number for number, _ in chosen],
        pictures=pictures,
        images=images,
        text=text,
        questions=[record.question for record in asked],
        truths=[Counter(map(normalised, record.answers)).most_common(1)[0][0] for record in asked],
        families=[record.family for record in asked],
        targets=torch.stack([vocabulary.targets(record.answers) for record in asked]),
        masks=[mask for _, mask in chosen],
        deciding=deciding,
        known=[record.truth for record in asked],
        others=others_of([record.image_id for record in asked]),
        all_images=images,
        all_text=text,
    )


def _chosen(records: Records, visual: nn.Module, count: int, seed: int) -> list[tuple[int, _Mask]]:
    """Numbers and masks. The families take turns, in alphabetical order."""
    order = np.random.default_rng((seed, DRAWN_QUESTIONS)).permutation(len(records))
    order = order[records.lengths("answers")[order] > 0]
    queues = [
        _seen(records, order[records.families[order] == number].tolist(), visual)
        for number in records.family_numbers()
    ]
    chosen: list[tuple[int, _Mask]] = []
    while queues and len(chosen) < count:
        left = []
        for queue in queues:
            if len(chosen) < count and (found := next(queue, None)) is not None:
                chosen.append(found)
                left.append(queue)
        queues = left
    return chosen


def _seen(records: Records, numbers: Sequence[int], visual: nn.Module) -> Iterator[tuple[int, _Mask]]:
    """Those whose deciding pixels can be seen, or are not known."""
    for number in numbers:
        mask = mask_of(records[number], visual)
        if mask is None or mask.any():
            yield number, mask
