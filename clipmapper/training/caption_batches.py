"""Batches of caption data, from cached image tokens or from pixels."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from clipmapper.data.images import clip_input
from clipmapper.data.scenes_captions import CaptionSplit
from clipmapper.data.token_cache import build_image_cache
from clipmapper.models.captioner import Captioner
from clipmapper.training.processes import WHOLE, Share, batches_of


class CaptionBatches:
    """Batches of one split. With ``cached`` the image tower runs once over it, otherwise in every step.

    Captions are never cached: each time they are others.
    """

    def __init__(self, model: Captioner, split: CaptionSplit, name: str, cached: bool) -> None:
        self.model, self.split, self.name = model, split, name
        self.image_tokens = self._encode() if cached else None

    def batch(self, images: Sequence[int], captions: Sequence[str]) -> dict:
        """A batch of these images, each with one caption (see :class:`CaptionModule`)."""
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

    def _pixels(self, images: np.ndarray) -> Tensor:
        return clip_input(images, self.model.encoder.clip.visual)

    def _encode(self) -> Tensor:
        encoder = self.model.encoder.eval()
        with Progress(transient=True) as progress:
            task = progress.add_task(f"CLIP tokens, {self.name} split", total=len(self.split))
            return build_image_cache(
                lambda images: encoder.image_tokens(self._pixels(images).to(self.model.device)),
                self.split.images,
                progress=lambda done: progress.advance(task, done),
            )


def drawn_batches(split: CaptionBatches, *, batch_size: int, seed: int) -> Callable[[int, Share], dict]:
    """A share of the training batch of every step: every image once an epoch, with a newly drawn caption."""
    count = len(split.split)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return np.random.default_rng((seed, epoch)).permutation(count).tolist()

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        places = range(step * batch_size, (step + 1) * batch_size)
        images = [order(place // count)[place % count] for place in places]
        rng = random.Random(f"captions/{seed}/{step}")
        captions = [split.split.draw(image, rng) for image in images]
        return split.batch(share.rows(images), share.rows(captions))

    return batch_at
