"""Batches of caption data, from cached image tokens or from pixels."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from rich.progress import Progress
from torch import Tensor

from clipmapper.data.images import clip_input
from clipmapper.data.scenes_captions import CaptionSplit
from clipmapper.data.token_cache import TokenStore
from clipmapper.models.captioner import Captioner
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
            with Progress(transient=True) as progress:
                task = progress.add_task(f"CLIP tokens, {name} split", total=len(images))
                self.image_tokens = image_tokens(
                    model.encoder, store, images, lambda done: progress.advance(task, done)
                )

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


def drawn_batches(
    split: CaptionBatches | RecordCaptions, *, batch_size: int, captions: int, seed: int
) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step: every image once an epoch, each with ``captions`` newly
    drawn captions.

    Images whose captions are about as long come in the same batch.
    """
    count = len(split.split)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return np.random.default_rng((seed, epoch)).permutation(count).tolist()

    @lru_cache(maxsize=1)
    def together(number: int) -> list[list[tuple[int, list[str]]]]:
        first = number * _TOGETHER * batch_size
        images = [order(p // count)[p % count] for p in range(first, first + _TOGETHER * batch_size)]
        rng = random.Random(f"captions/{seed}/{number}")
        drawn = [(image, [split.split.draw(image, rng) for _ in range(captions)]) for image in images]
        drawn.sort(key=lambda one: max(len(caption.split()) for caption in one[1]))
        batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
        rng.shuffle(batches)
        return batches

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        rows = share.rows(together(step // _TOGETHER)[step % _TOGETHER])
        return split.batch([image for image, _ in rows], [caption for _, told in rows for caption in told])

    return batch_at
