"""Which questions are explained, and what is known about them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from clipmapper.data.content import content_digest, joint_digest
from clipmapper.data.images import clip_input
from clipmapper.data.world.vqa import VQASplit
from clipmapper.models.tokens import TokenizedText, tokenize, word_positions
from clipmapper.tasks.vqa.model import CLIPmapper


@dataclass(frozen=True)
class ExplainedSamples:
    """Questions to be explained, in a fixed order.

    ``masks`` (pixels that decide the answer) and ``deciding`` (words that do, per word of the question) are
    None for data that does not know them. ``pictures`` are what the model sees, as a reader is to see it;
    ``targets`` are the soft accuracies of every answer.
    """

    ids: Sequence[int]
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    images: Float[Tensor, "samples 3 model_height model_width"]
    text: TokenizedText
    questions: Sequence[str]
    truths: Sequence[str]
    families: Sequence[str]
    targets: Float[Tensor, "samples answers"]
    masks: Bool[np.ndarray, "samples height width"] | None
    deciding: Sequence[Sequence[bool]] | None

    def __len__(self) -> int:
        return len(self.questions)

    def digest(self) -> str:
        """Another one for other samples: of what their scores depend on."""
        return joint_digest(
            [
                content_digest(self.images.cpu().numpy()),
                content_digest(self.targets.cpu().numpy()),
                content_digest(json.dumps([self.ids, self.questions, self.truths, self.families]).encode()),
            ]
        )


def choose_samples(model: CLIPmapper, split: VQASplit, count: int, seed: int) -> ExplainedSamples:
    """``count`` questions of a split, the families in equal shares, drawn by ``seed``.

    Questions whose deciding objects are hidden completely behind others are left out.
    """
    rng = np.random.default_rng((seed, 0xE8))
    by_family: dict[str, list[int]] = {}
    for number in rng.permutation(len(split)):
        by_family.setdefault(split.questions[number].family, []).append(int(number))
    chosen: list[int] = []
    queues = [by_family[family] for family in sorted(by_family)]
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and not split.mask(queue[0]).any():
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    asked = [split.questions[number] for number in chosen]
    pictures = split.images[split.image_of[chosen]]
    index = {answer: i for i, answer in enumerate(model.answers)}
    targets = torch.zeros(len(asked), len(model.answers))
    for row, question in enumerate(asked):
        if question.answer in index:  # of a model that was trained on other data not all are
            targets[row, index[question.answer]] = 1.0
    tokenizer = model.encoder.tokenizer
    text = tokenize(tokenizer, [q.text for q in asked])
    deciding = []
    for row, question in enumerate(asked):
        words = word_positions(tokenizer, text.ids[row], text.removable[row])
        deciding.append([word in question.deciding_words for word, _ in words])
    return ExplainedSamples(
        ids=chosen,
        pictures=list(pictures),
        images=clip_input(pictures, model.encoder.clip.visual),
        text=text,
        questions=[q.text for q in asked],
        truths=[q.answer for q in asked],
        families=[q.family for q in asked],
        targets=targets,
        masks=np.stack([split.mask(number) for number in chosen]),
        deciding=deciding,
    )
