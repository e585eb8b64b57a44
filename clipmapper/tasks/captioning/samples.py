"""Which images' captions are explained, and what is known about the images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from clipmapper.data.content import content_digest, joint_digest
from clipmapper.data.record import Truth
from clipmapper.data.records import RecordData
from clipmapper.data.world.captions import WORD_KINDS, AlignedCaption
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.ngram_scores import DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.explanation_scores.chosen import points
from clipmapper.models.tokens import word_positions
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.training.explained import DRAWN_IMAGES, Samples, looked_at, mask_of, others_of

TESTS = ("caption", "word")  # what is perturbed: by the caption's map, by one word's map


@dataclass(frozen=True)
class KnownCaption:
    """A true caption of an image, and the pixels that its words speak of.

    ``words``: (kind, mask) of the words that speak of something to be seen, by their place among the
    caption's words as the tokenizer splits it.
    """

    text: str
    words: dict[int, tuple[str, Bool[np.ndarray, "height width"]]]


@dataclass(frozen=True)
class CaptionSamples(Samples):
    """Images whose captions are to be explained.

    ``frequencies``: CIDEr's, of all images of the split. ``spoken``: a true caption of an image whose words
    know what they speak of, None where there is none. ``masks``: the pixels that captions of an image speak
    of, None where that is not known; so has ``known``, what the data set knows. ``all_images``: of the
    samples that ``others`` names.
    """

    of_all = ("frequencies", "all_images")

    ids: Sequence[int]
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    images: Float[Tensor, "samples 3 model_height model_width"]
    references: Sequence[Sequence[str]]
    frequencies: DocumentFrequencies
    spoken: Sequence[KnownCaption | None]
    masks: Sequence[Bool[np.ndarray, "_ _"] | None]
    known: Sequence[Truth | None]
    others: Sequence[int]
    all_images: Float[Tensor, "all 3 model_height model_width"]

    def digest(self) -> str:
        known = [caption.text for caption in self.spoken if caption is not None]
        counts = self.frequencies.counts
        of_split = [self.frequencies.images, len(counts), sum(counts.values())]
        texts = json.dumps([self.ids, self.references, known, of_split])
        return joint_digest([content_digest(self.images.cpu().numpy()), content_digest(texts.encode())])

    def undecided(self) -> int:
        return sum(not np.any(getattr(truth, "instances", 0)) for truth in self.known)

    def points(self, methods: int, scores: Sequence[str]) -> int:
        return sum(len(TESTS) * points(score, len(self), methods, ("image",)) for score in scores)


def caption_samples(model: Captioner, data: RecordData, split: str, count: int, seed: int) -> CaptionSamples:
    """``count`` images of a split that have captions, drawn by ``seed``."""
    records = data.split(split)
    told_of = np.flatnonzero(records.lengths("captions"))
    if not len(told_of):
        raise UserError(f"split={split}: no image has captions of people, by which explanations are scored")
    rng = np.random.default_rng((seed, DRAWN_IMAGES))
    chosen = told_of[rng.permutation(len(told_of))[:count]].tolist()
    told = [records[number] for number in chosen]
    spoken: list[KnownCaption | None] = []
    for record in told:
        aligned = getattr(record.truth, "aligned", None)
        if aligned is None:
            spoken.append(None)
            continue
        captions = aligned(len(record.captions))
        spoken.append(_known(model, captions[rng.integers(len(captions))], record.truth.instances))
    visual = model.encoder.clip.visual
    pictures, images = looked_at(told, data.reader(model.encoder), visual)
    return CaptionSamples(
        ids=chosen,
        pictures=pictures,
        images=images,
        references=[list(record.captions) for record in told],
        frequencies=DocumentFrequencies.of(
            [[ptb_tokenise(caption) for caption in captions] for captions in records.captions() if captions]
        ),
        spoken=spoken,
        masks=[mask_of(record, visual) for record in told],
        known=[record.truth for record in told],
        others=others_of([record.image_id for record in told]),
        all_images=images,
    )


def _known(
    model: Captioner, caption: AlignedCaption, instances: UInt8[np.ndarray, "height width"]
) -> KnownCaption:
    """Words without a visible pixel of what they speak of are left out."""
    text = model.tokenize(caption.text)
    spelled = [word for word, _ in word_positions(model.tokenizer, text.ids[0], text.removable[0])]
    places = token_word_places([word.text for word in caption.words], spelled)
    words: dict[int, tuple[str, np.ndarray]] = {}
    for place, word in zip(places, caption.words, strict=True):
        mask = np.isin(instances, [number + 1 for number in word.objects])
        if word.kind in WORD_KINDS and mask.any():
            words.setdefault(place, (word.kind, mask))
    return KnownCaption(caption.text, words)


def token_word_places(words: Sequence[str], spelled: Sequence[str]) -> list[int]:
    """For each of the ``words`` of a caption, which word of the tokenizer's ``spelled`` it begins in.

    A tokenizer may keep a comma with the word before it. Raises ``ValueError`` where the letters differ.
    """
    if "".join(words).lower() != "".join("".join(spelled).lower().split()):
        raise ValueError(f"not the same text: {list(words)} and {list(spelled)}")
    owner = [place for place, word in enumerate(spelled) for _ in "".join(word.split())]
    starts = np.cumsum([0, *(len(word) for word in words[:-1])])
    return [owner[start] for start in starts]
