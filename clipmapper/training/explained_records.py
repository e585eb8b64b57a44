"""Samples to be explained, of records or of scenes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from clipmapper.data.answers import AnswerVocabulary, normalised
from clipmapper.data.images import seen_part
from clipmapper.data.pixels import PixelReader
from clipmapper.data.pixels import normalised as normalised_pixels
from clipmapper.data.records import Record, RecordData
from clipmapper.data.tables.columns import RecordTable
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.cider import DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.samples import ExplainedCaptions, choose_caption_samples
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.samples import ExplainedSamples, choose_samples

_LARGEST = 640  # pixels of the longer side of the pictures that are kept


def samples_of(
    model: CLIPmapper | Captioner, data, split: str, count: int, seed: int
) -> ExplainedSamples | ExplainedCaptions:
    """``count`` questions (images with captions) of a split of the data, drawn by ``seed``.

    Scores are of the answers that the model can give, which need not be those of the data.

    Raises ``UserError`` for a split that the data does not have, or that has nothing to explain.
    """
    captioner = isinstance(model, Captioner)
    if not isinstance(data, RecordData):
        choose = choose_caption_samples if captioner else choose_samples
        return choose(model, getattr(data, split), count, seed)
    records = data.split(split)
    reader = model.encoder.reader(data.decoding)
    if captioner:
        return _captions(model, records, reader, count, seed)
    if not records.lengths("answers").any():
        raise UserError(f"split={split}: its questions have no answers")
    vocabulary = AnswerVocabulary(model.answers, data.vocabulary.rule)
    return _questions(model, records, reader, vocabulary, count, seed)


def unanswerable(samples: ExplainedSamples | ExplainedCaptions) -> str | None:
    """One line about questions none of whose answers the model can give, None where there are none.

    Raises ``UserError`` where there are no others.
    """
    if isinstance(samples, ExplainedCaptions):
        return None
    found = int((samples.targets.sum(1) == 0).sum())
    if found == len(samples):
        raise UserError(
            f"data: none of the answers to these {found} questions is one that the model can give, such as "
            f"{samples.truths[0]!r}; choose the data that it was trained on, or like them"
        )
    if not found:
        return None
    return (
        f"{found} of {len(samples)} questions have no answer that the model can give: none is right for them"
    )


def _questions(
    model: CLIPmapper,
    records: RecordTable,
    reader: PixelReader,
    vocabulary: AnswerVocabulary,
    count: int,
    seed: int,
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
    pictures, images = _opened(model, asked, reader)
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


def _captions(
    model: Captioner, records: RecordTable, reader: PixelReader, count: int, seed: int
) -> ExplainedCaptions:
    order = np.random.default_rng((seed, 0xCA)).permutation(len(records))
    chosen = [int(number) for number in order[:count]]
    pictures, images = _opened(model, [records[number] for number in chosen], reader)
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
    model: CLIPmapper | Captioner, records: Sequence[Record], reader: PixelReader
) -> tuple[list[np.ndarray], torch.Tensor]:
    """What the model sees of each image, to be looked at, and as its encoder reads it."""
    visual = model.encoder.clip.visual
    pictures, images = [], []
    for record in records:
        images.append(reader(record))
        picture = Image.fromarray(seen_part(record.pil(), visual))
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture))
    return pictures, normalised_pixels(torch.stack(images), visual)
