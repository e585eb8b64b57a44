"""What becomes of the CLIP itself while its towers are trained: whether it still finds texts and images."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipmapper.data.records import Record, RecordData
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import tokenize
from clipmapper.relevance.modes import evaluating
from clipmapper.training.run_folder import CLIP_BEFORE, write_json

_IMAGES = 1000
_TEXTS = 5  # of an image at most, as COCO has captions
_TOGETHER = 64
_SCORES = ("image_to_text_top1", "image_to_text_top5", "text_to_image_top1", "text_to_image_top5")


@dataclass(frozen=True)
class _Pool:
    """Images, their different texts, and which of them belong together: an image may have several texts, and
    a text (a question, above all) several images."""

    images: list[Record]
    texts: list[str]
    own: Bool[Tensor, "images texts"]


class ClipRetrieval:
    """Retrieval by the pooled embeddings of an encoder, before and behind training.

    Of at most 1,000 validation images, drawn by ``seed``, with their captions or questions. Nothing that
    training uses (random state, modes) is touched. ``folder``: of the run, which keeps the scores of before.
    """

    def __init__(self, data: RecordData, seed: int, folder: Path) -> None:
        self.data, self.kind, self.file = data, data.kind, folder / CLIP_BEFORE
        self.pool = _pool(data, seed)

    def before(self, encoder: ClipEncoder) -> None:
        """Keep the scores of an encoder that is not trained yet."""
        write_json(self.file, self.scores(encoder))

    def results(self, encoder: ClipEncoder) -> dict:
        """For ``results.json``; ``before`` is None in a run that was begun when nobody kept it."""
        return {
            "images": len(self.pool.images),
            self.kind: len(self.pool.texts),
            "before": json.loads(self.file.read_text()) if self.file.is_file() else None,
            "after": self.scores(encoder),
        }

    @torch.no_grad()
    def scores(self, encoder: ClipEncoder) -> dict[str, float]:
        """Shares of images with one of their texts among the first of all, and of texts with an image."""
        reader, device = self.data.reader(encoder), next(encoder.parameters()).device
        whole = encoder.text_tower.padding_matters
        found = []
        with evaluating(encoder):
            for start in range(0, max(len(self.pool.images), len(self.pool.texts)), _TOGETHER):
                some, texts = (
                    all_[start : start + _TOGETHER] for all_ in (self.pool.images, self.pool.texts)
                )
                # Both towers at once, the one that has come to its end with what it had at first.
                images = reader.many(some or self.pool.images[:1])
                ids = tokenize(encoder.tokenizer, texts or self.pool.texts[:1], whole_context=whole).ids
                image, text = encoder.embeddings(images.to(device), ids.to(device))
                found.append((image[: len(some)].float(), text[: len(texts)].float()))
        image, text = (torch.cat(parts) for parts in zip(*found, strict=True))
        return retrieved((image @ text.T).cpu(), self.pool.own)

    def line(self, results: Mapping) -> str:
        """Say it."""
        before, after = results["before"], results["after"]

        def change(score: str) -> str:
            first = "" if before is None else f"{100 * before[score]:.1f} % before, "
            return f"{first}{100 * after[score]:.1f} % after"

        images, texts = results["images"], results[self.kind]
        return (
            f"the CLIP itself, {images:,} validation images and their {texts:,} {self.kind}: image to text "
            f"top-1 {change(_SCORES[0])} (top-5 {change(_SCORES[1])}), text to image top-1 "
            f"{change(_SCORES[2])} (top-5 {change(_SCORES[3])})"
        )


def retrieved(
    similarity: Float[Tensor, "images texts"], own: Bool[Tensor, "images texts"]
) -> dict[str, float]:
    """How often one of the own is among the first k. Of equal ones the others come first: a tower that gives
    everything the same embedding finds nothing."""
    scores = {}
    for name, near, mine in (("image_to_text", similarity, own), ("text_to_image", similarity.T, own.T)):
        nearest = near.masked_fill(~mine, -torch.inf).amax(dim=1, keepdim=True)
        ahead = (~mine & (near >= nearest)).sum(dim=1)
        for k in (1, 5):
            scores[f"{name}_top{k}"] = float((ahead < k).float().mean())
    return scores


def _pool(data: RecordData, seed: int) -> _Pool:
    records = data.split("validation")
    first, image_of = records.first_of_images()
    rng = np.random.default_rng((seed, zlib.crc32(b"retrieval")))
    drawn = np.sort(rng.choice(len(first), min(_IMAGES, len(first)), replace=False))
    place = {int(image): number for number, image in enumerate(drawn)}
    texts: list[dict[str, None]] = [{} for _ in drawn]
    for row in np.flatnonzero(np.isin(image_of, drawn)):
        record = records[int(row)]
        told = record.captions if data.kind == "captions" else (record.question,)
        texts[place[int(image_of[row])]] |= dict.fromkeys(told)
    chosen = [list(some)[:_TEXTS] for some in texts]
    different = list(dict.fromkeys(text for some in chosen for text in some))
    number_of = {text: number for number, text in enumerate(different)}
    own = torch.zeros(len(drawn), len(different), dtype=torch.bool)
    for image, some in enumerate(chosen):
        own[image, [number_of[text] for text in some]] = True
    return _Pool([records[int(first[image])] for image in drawn], different, own)
