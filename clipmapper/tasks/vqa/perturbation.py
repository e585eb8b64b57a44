"""The scores of a perturbation test of answers: with some patches or words removed, or replaced."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ScoreKept: TypeAlias = Callable[
    [
        Int[Tensor, "variants"],
        Int[Tensor, "variants kept_patches"] | None,
        Int[Tensor, "variants kept_tokens"] | None,
    ],
    Float[Tensor, "variants answers"],
]
"""`score_kept(sample, image_keep, text_keep)` → logits. `sample` are positions in the current chunk.

`image_keep` holds the patches kept (0 … P−1, ascending; the class token is always kept and not listed),
`text_keep` the text tokens kept *including* start and end tokens, ascending, filled up with −1 at the end.
None means that nothing of that modality is removed. The indices are on the CPU; the logits may be anywhere.
"""


class AnswerScorer:
    """A :class:`clipmapper.evaluation.perturbation.VariantScorer` of answers.

    "accuracy" is the soft accuracy of the answer given after removal, `targets[i, a]` for answer a of sample
    i; "probability" the softmax over answers of the answer that the *unperturbed* model gave.
    """

    names = ("accuracy", "probability")

    def __init__(self, score_kept: ScoreKept, targets: Float[Tensor, "samples answers"]) -> None:
        self.score_kept = score_kept
        self.targets = targets
        self.original = torch.empty(len(targets), dtype=torch.int64)  # what the unperturbed model answers

    def unperturbed(self, batch_size: int) -> Float[np.ndarray, "samples scores"]:
        """Scores of the untouched samples; notes their answers, which `score` then explains."""
        scores = []
        for sample in np.split(
            np.arange(len(self.targets)), range(batch_size, len(self.targets), batch_size)
        ):
            logits = self._logits(sample, None, None)
            self.original[sample] = logits.argmax(dim=1).cpu()
            scores.append(self._score(sample, logits))
        return np.concatenate(scores)

    def score(
        self, sample: Int[np.ndarray, "variants"], image_keep: Tensor | None, text_keep: Tensor | None
    ) -> Float[np.ndarray, "variants scores"]:
        return self._score(sample, self._logits(sample, image_keep, text_keep))

    def _logits(
        self, sample: Int[np.ndarray, "variants"], image_keep: Tensor | None, text_keep: Tensor | None
    ) -> Float[Tensor, "variants answers"]:
        logits = self.score_kept(torch.from_numpy(sample), image_keep, text_keep)
        if logits.shape != (len(sample), self.targets.shape[1]) or not logits.isfinite().all():
            raise ValueError(f"score_kept must give finite logits [variants, answers]: {tuple(logits.shape)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # no softmax in half precision

    def _score(
        self, sample: Int[np.ndarray, "variants"], logits: Float[Tensor, "variants answers"]
    ) -> Float[np.ndarray, "variants scores"]:
        accuracy = self.targets[torch.from_numpy(sample), logits.argmax(dim=1).cpu()]
        explained = self.original[sample].to(logits.device)
        probability = logits.softmax(dim=1).gather(1, explained[:, None])[:, 0].cpu()
        return np.stack([accuracy.double().numpy(), probability.double().numpy()], axis=1)
