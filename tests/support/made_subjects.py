"""Subjects of scores of explanations whose certainty is a function that a test writes down."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from clipmapper.evaluation.explanation_scores.subject import OneScore
from clipmapper.evaluation.perturbation import ModalityRelevance

Certainty = Callable[[int, frozenset[int], frozenset[int]], float]
"""Of a sample, the patches and the words (numbered from 0) that are left."""


class MadeScorer:
    """What the function says, and a second score that no score of explanations may look at."""

    names = ("accuracy", "probability")

    def __init__(self, subject: "MadeSubject", certainty: Certainty) -> None:
        self._subject, self._certainty = subject, certainty
        self.forwards: list[int] = []  # the variants of each

    def unperturbed(self, batch_size: int) -> np.ndarray:
        return self.score(np.arange(len(self._subject.sample_ids)), None, None)

    def score(self, sample: np.ndarray, image_keep: Tensor | None, text_keep: Tensor | None) -> np.ndarray:
        self.forwards.append(len(sample))
        subject, found = self._subject, []
        for row, number in enumerate(sample.tolist()):
            patches = frozenset(range(subject.patches))
            kept = set(subject.text_valid[number].nonzero()[:, 0].tolist())
            if image_keep is not None:
                assert (image_keep >= 0).all()  # images of a forward keep equally many
                patches = frozenset(image_keep[row].tolist())
            if text_keep is not None:
                kept = set(text_keep[row].tolist()) - {-1}
            places = subject.removable_text[number].nonzero()[:, 0].tolist()
            always = set(subject.text_valid[number].nonzero()[:, 0].tolist()) - set(places)
            assert always <= kept <= always | set(places)  # start and end stay, padding never comes
            words = frozenset(k for k, place in enumerate(places) if place in kept)
            found.append(self._certainty(number, patches, words))
        return np.stack([np.full(len(found), np.nan), found], axis=1)


class MadeSubject:
    """``words``: how many each sample has, between a start and an end token. ``seen``: the certainty of a
    sample at an image; ``explained``: (images) → maps."""

    certainty = "probability"

    def __init__(
        self,
        certainty: Certainty = lambda sample, patches, words: 0.5,
        *,
        words: Sequence[int] = (2,),
        grid: tuple[int, int] = (2, 2),
        modalities: tuple[str, ...] = ("image", "text"),
        images: Tensor | None = None,
        seen: Callable[[int, Tensor], float] | None = None,
        explained: Callable[[Tensor], Mapping[str, ModalityRelevance]] | None = None,
        layers: Sequence[tuple[str, Sequence[nn.Parameter]]] = (),
        first_id: int = 40,
    ) -> None:
        self._certainty, self._seen, self._explained = certainty, seen, explained
        self.modalities, self.grid, self.layers = modalities, grid, layers
        self.patches = grid[0] * grid[1]
        self.sample_ids = np.arange(len(words)) + first_id
        place, many = torch.arange(max(words) + 2), torch.tensor(list(words))[:, None]
        self.text_valid = place < many + 2
        self.removable_text = (place > 0) & (place <= many)
        self.images = torch.zeros(len(words), 3, 4, 4) if images is None else images
        self.replaced: list[str | None] = []  # what scorers were asked for
        self.scorers: list[MadeScorer] = []

    def scorer(self, replacement: str | None = None) -> MadeScorer:
        self.replaced.append(replacement)
        self.scorers.append(MadeScorer(self, self._certainty))
        return self.scorers[-1]

    def certain(self) -> OneScore:
        return OneScore(self.scorer(), self.certainty)

    def certainty_of(self, sample: np.ndarray, images: Tensor) -> np.ndarray:
        return np.array([self._seen(int(i), image) for i, image in zip(sample, images, strict=True)])

    def maps(self, images: Tensor | None = None, methods=None) -> Mapping[str, ModalityRelevance]:
        found = self._explained(self.images if images is None else images)
        return found if methods is None else {method: found[method] for method in methods}

    def relevance(self, image: np.ndarray, words: np.ndarray | None = None) -> ModalityRelevance:
        """Of patches and of words, at the places that these have in the texts."""
        text = np.zeros(self.removable_text.shape)
        if words is not None:
            text[:, 1 : 1 + words.shape[1]] = words
        return ModalityRelevance(torch.from_numpy(np.asarray(image, float)), torch.from_numpy(text))

    def drawn(self, seed: int, like: int = 1) -> ModalityRelevance:
        """Relevance without ties, whole numbers / ``like``."""
        rng = np.random.default_rng(seed)
        shape = len(self.sample_ids), self.removable_text.shape[1] - 2
        image = [rng.permutation(self.patches) for _ in self.sample_ids]
        return self.relevance(np.array(image) / like, rng.permuted(np.indices(shape)[1], axis=1) / like)


def any_certainty(seed: int, samples: int, patches: int, words: int) -> Certainty:
    """A random number for every set of tokens."""
    rng = np.random.default_rng(seed)
    table = {
        (sample, *kept): rng.random()
        for sample in range(samples)
        for kept in product((False, True), repeat=patches + words)
    }

    def certainty(sample: int, image: frozenset[int], text: frozenset[int]) -> float:
        return table[(sample, *(k in image for k in range(patches)), *(k in text for k in range(words)))]

    return certainty
