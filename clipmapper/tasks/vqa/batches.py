"""Batches of the built-in VQA data, from cached tokens or from pixels."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from clipmapper.data.images import clip_input
from clipmapper.data.tokens.cache import TokenCache, TokenStore
from clipmapper.data.world.vqa import VQASplit
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.asked_texts import AskedTexts, asked_texts
from clipmapper.training.encoder_tokens import ArrayImages, question_tokens
from clipmapper.training.processes import WHOLE, Share, batches_of
from clipmapper.training.token_room import check_tokens


class SplitBatches:
    """Batches of one split.

    With a ``store`` the encoder runs once over the split, otherwise in every step. ``texts``: the questions'
    token ids, where they are there already.
    """

    def __init__(
        self,
        model: CLIPmapper,
        split: VQASplit,
        name: str,
        store: TokenStore | None,
        texts: AskedTexts | None = None,
    ) -> None:
        self.model, self.split, self.name = model, split, name
        index = {answer: i for i, answer in enumerate(model.answers)}
        self.answer = torch.tensor([index[q.answer] for q in split.questions])
        self.cache: TokenCache | None = None
        if store is not None:
            images = ArrayImages(split.images, model.encoder.clip.visual)
            texts, image_of = texts or _asked(model, split, name), torch.from_numpy(split.image_of)
            self.cache = question_tokens(model.encoder, store, images, texts, image_of, name)

    def batch(self, questions: Tensor) -> dict:
        """A training batch of these questions (see :class:`clipmapper.tasks.vqa.training.VQAModule`)."""
        batch = self.questions_only(questions)
        if self.cache is not None:
            batch["image_tokens"] = self.cache.images(questions)
        else:
            images = self.split.images[self.split.image_of[questions.numpy()]]
            batch["images"] = clip_input(images, self.model.encoder.clip.visual)
        return batch

    def questions_only(self, questions: Tensor) -> dict:
        """The same batch without its images."""
        targets = torch.zeros(len(questions), len(self.model.answers))
        targets[torch.arange(len(questions)), self.answer[questions]] = 1.0
        batch = {"targets": targets, "ids": [f"{self.name}/{int(q)}" for q in questions]}
        if self.cache is not None:
            return batch | self.cache.texts(questions)
        texts = [self.split.questions[int(q)].text for q in questions]
        return batch | {"text": tokenize(self.model.encoder.tokenizer, texts)}

    def labelled(self, batch_size: int, share: Share = WHOLE) -> Iterator[dict]:
        """A share of all questions in order, with what validation needs."""
        for rows in batches_of(len(self.split), batch_size, share):
            numbers = torch.tensor(rows)
            asked = [self.split.questions[int(n)] for n in numbers]
            # Ten annotators who agree: the official accuracy is then 1 or 0.
            extra = {"answers": [[q.answer] * 10 for q in asked], "families": [q.family for q in asked]}
            yield self.batch(numbers) | extra


def training_batches(
    simple: SplitBatches,
    full: SplitBatches,
    *,
    batch_size: int,
    simple_steps: int,
    first_families: Sequence[str],
    first_steps: int,
    shares: Mapping[str, float],
    told_by_size: float,
    seed: int,
) -> Callable[[int, Share], dict]:
    """A share of the batch of every step: simple scenes first, then all; drawn by (seed, step).

    Families are drawn as often as their ``shares`` say; in the first ``first_steps`` only ``first_families``.
    ``told_by_size``: within a family that has such, the share of questions about one of two objects that only
    their size tells apart.
    """
    numbers = {split.name: _numbers_by_family(split) for split in (simple, full)}

    def batch_at(step: int, share: Share = WHOLE) -> dict:
        source = simple if step < simple_steps else full
        of_family = numbers[source.name]
        asked = [f for f in first_families if f in of_family] if step < first_steps else []
        asked = asked or list(of_family)
        weights = np.array([shares[family] for family in asked])
        if not weights.any():  # the first families may be asked first and then never again
            weights = np.ones(len(asked))
        rng = np.random.default_rng((seed, step))
        drawn = rng.choice(len(asked), size=batch_size, p=weights / weights.sum())
        by_size = (rng.random(batch_size) < told_by_size).astype(int)
        questions = []
        for k, kind, place in zip(drawn, by_size, rng.random(batch_size), strict=True):
            kinds = of_family[asked[k]]
            some = kinds[kind] if len(kinds[kind]) else kinds[1 - kind]
            questions.append(some[int(place * len(some))])
        return source.batch(torch.tensor(np.array(share.rows(questions))))

    return batch_at


def _numbers_by_family(split: SplitBatches) -> dict[str, tuple[list[int], list[int]]]:
    """Of every family the questions that a size does not tell, and those that it tells."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for number, question in enumerate(split.split.questions):
        found.setdefault(question.family, ([], []))[question.told_by_size].append(number)
    return found


def scene_splits(
    model: CLIPmapper, splits: Mapping[str, VQASplit], store: TokenStore | None
) -> dict[str, SplitBatches]:
    asked: dict[str, AskedTexts] = {}
    if store is not None:
        asked = {name: _asked(model, split, name) for name, split in splits.items()}
        check_tokens(
            model.encoder,
            store,
            {
                name: (ArrayImages(split.images, model.encoder.clip.visual), asked[name])
                for name, split in splits.items()
            },
        )
    return {name: SplitBatches(model, split, name, store, asked.get(name)) for name, split in splits.items()}


def _asked(model: CLIPmapper, split: VQASplit, name: str) -> AskedTexts:
    return asked_texts(model.encoder.tokenizer, [question.text for question in split.questions], name)
