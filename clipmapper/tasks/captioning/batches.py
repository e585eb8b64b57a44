"""Batches of caption data, from cached image tokens or from pixels."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from clipmapper.data.images import clip_input
from clipmapper.data.tokens.cache import TokenStore
from clipmapper.data.world.captioning import CaptionSplit
from clipmapper.host.progress import progress
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.training.encoder_tokens import ArrayImages, image_tokens
from clipmapper.training.processes import WHOLE, Share, batches_of
from clipmapper.training.record_batches import RecordCaptions


class CaptionBatches:
    """Batches of one split. With a ``store`` the image tower runs once over it, otherwise in every step.

    Captions are never cached: each time they are others.
    """

    def __init__(self, model: Captioner, split: CaptionSplit, name: str, store: TokenStore | None) -> None:
        self.model, self.split, self.name = model, split, name
        self.image_tokens: Tensor | None = None
        if store is not None:
            images = ArrayImages(split.images, model.encoder.clip.visual)
            with progress(f"CLIP tokens, {name} split", len(images)) as advance:
                self.image_tokens = image_tokens(model.encoder, store, images, advance)

    def batch(self, images: Sequence[int], captions: Sequence[str]) -> dict:
        """A batch of these images and their captions, as many of each (see :class:`CaptionModule`)."""
        batch: dict = {
            "text": self.model.tokenize(captions),
            "references": [self.split.references[image] for image in images],
            "ids": [f"{self.name}/{image}" for image in images],
        }
        if self.image_tokens is not None:
            batch["image_tokens"] = self.image_tokens[torch.tensor(images)].float()
        else:
            batch["images"] = self._pixels(self.split.images[list(images)])
        return batch

    def labelled(self, batch_size: int, share: Share = WHOLE) -> Iterator[dict]:
        """A share of all images in order, with their numbers; the caption is the first reference."""
        for rows in batches_of(len(self.split), batch_size, share):
            numbers = list(rows)
            captions = [self.split.references[number][0] for number in numbers]
            yield self.batch(numbers, captions) | {"numbers": numbers}

    def picture(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """An image to be looked at."""
        return self.split.images[image]

    def _pixels(self, images: np.ndarray) -> Tensor:
        return clip_input(images, self.model.encoder.clip.visual)


# Steps whose images are drawn together, then put in batches by the length of their captions: with 8, a batch
# of 64 with two captions each is padded to 23 tokens instead of 36.
_TOGETHER = 8


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


@dataclass(frozen=True)
class Stage:
    """A part of training: which images, and which captions of them.

    Attributes
    ----------
    draw : a caption of an image of ``split``, in words of its own each time.
    until : the step at which the next stage begins, None for the last one.
    often, often_share : numbers of images that are drawn besides, and for which share of all.
    """

    split: CaptionBatches | RecordCaptions
    draw: Callable[[int, random.Random], str]
    until: int | None = None
    often: Sequence[int] = ()
    often_share: float = 0.0

    def images(self, numbers: range, seed: int, rng: random.Random) -> list[int]:
        """Images for the places ``numbers`` of an endless row of epochs: every image once an epoch, but for
        those in whose place another is drawn."""
        count = len(self.split.split)
        found = [_order(seed, number // count, count)[number % count] for number in numbers]
        if not self.often or not self.often_share:
            return found
        return [rng.choice(self.often) if rng.random() < self.often_share else image for image in found]


def drawn_batches(
    stages: Sequence[Stage], *, batch_size: int, captions: int, seed: int
) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step: images, each with ``captions`` newly drawn captions.

    Images whose captions are about as long come in the same batch.
    """

    @lru_cache(maxsize=1)
    def together(number: int) -> tuple[Stage, list[list[tuple[int, list[str]]]]]:
        step, size = number * _TOGETHER, _TOGETHER * batch_size
        stage = next(stage for stage in stages if stage.until is None or step < stage.until)
        rng = random.Random(f"captions/{seed}/{number}")
        images = stage.images(range(number * size, (number + 1) * size), seed, rng)
        drawn = [(image, [stage.draw(image, rng) for _ in range(captions)]) for image in images]
        drawn.sort(key=lambda one: max(len(caption.split()) for caption in one[1]))
        batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
        rng.shuffle(batches)
        return stage, batches

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        stage, batches = together(step // _TOGETHER)
        rows = share.rows(batches[step % _TOGETHER])
        return stage.split.batch(
            [image for image, _ in rows], [caption for _, told in rows for caption in told]
        )

    return batch_at
