"""Which images' captions are explained, and what is known about the images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from clipmapper.data.content import content_digest, joint_digest
from clipmapper.data.images import clip_input
from clipmapper.data.world.captions import WORD_KINDS, AlignedCaption, aligned_captions
from clipmapper.evaluation.captions.cider import DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.models.tokens import word_positions
from clipmapper.tasks.captioning.model import Captioner


@dataclass(frozen=True)
class KnownCaption:
    """A true caption of an image, and the pixels that its words speak of.

    ``words``: (kind, mask) of the words that speak of something to be seen, by their place among the
    caption's words as the tokenizer splits it.
    """

    text: str
    words: dict[int, tuple[str, Bool[np.ndarray, "height width"]]]


@dataclass(frozen=True)
class ExplainedCaptions:
    """Images whose captions are to be explained, in a fixed order.

    ``frequencies``: CIDEr's, of all images of the split. ``known``: a true caption of each image whose words
    know what they speak of, None for data that does not.
    """

    ids: Sequence[int]
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    images: Float[Tensor, "samples 3 model_height model_width"]
    references: Sequence[Sequence[str]]
    frequencies: DocumentFrequencies
    known: Sequence[KnownCaption] | None

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Another one for other samples: of what their scores depend on."""
        known = [] if self.known is None else [caption.text for caption in self.known]
        counts = self.frequencies.counts
        of_split = [self.frequencies.images, len(counts), sum(counts.values())]
        texts = json.dumps([self.ids, self.references, known, of_split])
        return joint_digest([content_digest(self.images.cpu().numpy()), content_digest(texts.encode())])


def choose_caption_samples(model: Captioner, split, count: int, seed: int) -> ExplainedCaptions:
    """``count`` images of a split of captions (as :class:`clipmapper.data.world.captioning.CaptionSplit`)."""
    rng = np.random.default_rng((seed, 0xCA))
    chosen = [int(number) for number in rng.permutation(len(split.images))[:count]]
    known = None
    if getattr(split, "scenes", None) is not None:
        known = []
        for number in chosen:
            told = aligned_captions(split.scenes[number], len(split.references[number]))
            known.append(_known(model, told[rng.integers(len(told))], split.instances[number]))
    pictures = split.images[chosen]
    references = [[ptb_tokenise(caption) for caption in captions] for captions in split.references]
    return ExplainedCaptions(
        ids=chosen,
        pictures=list(pictures),
        images=clip_input(pictures, model.encoder.clip.visual),
        references=[list(split.references[number]) for number in chosen],
        frequencies=DocumentFrequencies.of(references),
        known=known,
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
