"""Samples to be explained, of records or of scenes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from clipmapper.data.answers import AnswerVocabulary, normalised
from clipmapper.data.images import seen_part
from clipmapper.data.record_table import RecordTable
from clipmapper.data.records import Record, RecordData
from clipmapper.errors import UserError
from clipmapper.evaluation.cider import DocumentFrequencies
from clipmapper.evaluation.ptb_tokenizer import ptb_tokenise
from clipmapper.models.captioner import Captioner
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.tokens import tokenize
from clipmapper.training.explained_captions import ExplainedCaptions, choose_caption_samples
from clipmapper.training.explained_samples import ExplainedSamples, choose_samples

_LARGEST = 640  # pixels of the longer side of the pictures that are kept


def samples_of(
    model: CLIPmapper | Captioner, data, split: str, count: int, seed: int
) -> ExplainedSamples | ExplainedCaptions:
    """``count`` questions (images with captions) of a split of the data, drawn by ``seed``.

    Raises ``UserError`` for a split that the data does not have, or that has nothing to explain.
    """
    captioner = isinstance(model, Captioner)
    if not isinstance(data, RecordData):
        choose = choose_caption_samples if captioner else choose_samples
        return choose(model, getattr(data, split), count, seed)
    records = data.split(split)
    if captioner:
        return _captions(model, records, count, seed)
    if not records.lengths("answers").any():
        raise UserError(f"split={split}: its questions have no answers")
    return _questions(model, records, data.vocabulary, count, seed)


def _questions(
    model: CLIPmapper, records: RecordTable, vocabulary: AnswerVocabulary, count: int, seed: int
) -> ExplainedSamples:
    """Families in equal shares; what decides an answer is not known."""
    order = np.random.default_rng((seed, 0xE8)).permutation(len(records))
    order = order[records.lengths("answers")[order] > 0]
    # No more of a family than are chosen in all.
    queues = [
        order[records.families[order] == number][:count].tolist() for number in records.family_numbers()
    ]
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    chosen = turns[:count]
    asked = [records[number] for number in chosen]
    pictures, images = _opened(model, asked)
    return ExplainedSamples(
        ids=chosen,
        pictures=pictures,
        images=images,
        text=tokenize(model.encoder.tokenizer, [record.question for record in asked]),
        questions=[record.question for record in asked],
        truths=[Counter(map(normalised, record.answers)).most_common(1)[0][0] for record in asked],
        families=[record.family for record in asked],
        targets=torch.stack([vocabulary.targets(record.answers) for record in asked]),
        masks=None,
        deciding=None,
    )


def _captions(model: Captioner, records: RecordTable, count: int, seed: int) -> ExplainedCaptions:
    order = np.random.default_rng((seed, 0xCA)).permutation(len(records))
    chosen = [int(number) for number in order[:count]]
    pictures, images = _opened(model, [records[number] for number in chosen])
    return ExplainedCaptions(
        ids=chosen,
        pictures=pictures,
        images=images,
        references=[list(records[number].captions) for number in chosen],
        frequencies=DocumentFrequencies.of(
            [[ptb_tokenise(caption) for caption in told] for told in records.captions()]
        ),
        known=None,
    )


def _opened(
    model: CLIPmapper | Captioner, records: Sequence[Record]
) -> tuple[list[np.ndarray], torch.Tensor]:
    """What the model sees of each image, to be looked at, and as its encoder reads it."""
    transform, visual = model.encoder.preprocess(), model.encoder.clip.visual
    pictures, images = [], []
    for record in records:
        image = record.pil()
        images.append(transform(image))
        picture = Image.fromarray(seen_part(image, visual))
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
    return pictures, torch.stack(images)
