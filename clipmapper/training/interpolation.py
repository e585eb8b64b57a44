"""Weights of the encoder between those before and behind training, chosen in validation.

WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 1). The mapper
and the head have no weights of before that would mean anything: only the encoder's are interpolated.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning
import torch
from torch import Tensor

from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.exported import DESCRIPTION
from clipmapper.training.best import better, monitored, put_weights
from clipmapper.training.checkpoint import write_checkpoint
from clipmapper.training.processes import is_main

_OF_ENCODER = "model.encoder.clip."


class Interpolation:
    """The weights between, and which of them is the best. ``before``: the file with those of before.

    ``weights``: how much of what is behind training is taken, 0 to 1. ``monitor``, ``mode``: the score, as of
    :class:`~clipmapper.training.best.KeepBest`.
    """

    def __init__(self, before: Path, weights: Sequence[float], monitor: str, mode: str) -> None:
        self.before, self.weights = before, sorted(weights)
        self.monitor, self.mode = monitor, mode
        self.tried: list[tuple[float, float]] = []  # (weight, score)

    def keep(self, encoder: ClipEncoder) -> None:
        """Write what the encoder begins with: whatever its weights are from, a resumed run has them."""
        state = {name: weight.detach().cpu() for name, weight in encoder.clip.named_parameters()}
        write_checkpoint(state, self.before)

    def choose(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        kept: Path,
        validate: Callable[[], object],
        interpolated: Path,
    ) -> float:
        """Try all weights, put the best in, and say which; of equal ones the nearest to those of before.

        ``kept``: the checkpoint with those behind training. The chosen ones go to a file of their own,
        ``interpolated``, where they are others: who is killed here finds ``kept`` as it was.
        """
        trained = torch.load(kept, map_location="cpu", weights_only=True, mmap=True)
        before = torch.load(self.before, map_location="cpu", weights_only=True, mmap=True)
        best: tuple[float, float] | None = None
        self.tried = []
        for weight in self.weights:
            put_weights(trainer, module, between(before, trained["state_dict"], weight))
            validate()
            score = monitored(trainer, self.monitor)
            self.tried.append((weight, score))
            if best is None or better(score, best[1], self.mode):
                best = weight, score
        self.chosen = best[0]
        state = between(before, trained["state_dict"], self.chosen)
        put_weights(trainer, module, state)
        if self.chosen < 1 and is_main():
            more = ("global_step", DESCRIPTION, "pytorch-lightning_version")
            write_checkpoint({"state_dict": state, **{key: trained[key] for key in more}}, interpolated)
        return self.chosen

    def line(self) -> str:
        """Say how good each was."""
        scores = ", ".join(f"{weight:g}: {score:.4g}" for weight, score in self.tried)
        return (
            f"encoder between before (0) and behind training (1), {self.monitor}: {scores}; what follows is "
            f"of {self.chosen:g}"
        )

    def results(self) -> dict:
        """For ``results.json``."""
        tried = [[weight, score if score == score else None] for weight, score in self.tried]
        return {"monitor": self.monitor, "mode": self.mode, "tried": tried, "weight": self.chosen}


def between(before: Mapping[str, Tensor], trained: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """All weights of a checkpoint, those of the encoder as far from ``before`` as ``weight`` says.

    Of adapters only the second factor is, which was 0: what they add is interpolated, W + weight · BA.
    """
    state = dict(trained)
    for name, old in before.items():
        if ".lora_A." not in name:
            new = trained[_OF_ENCODER + name]
            state[_OF_ENCODER + name] = torch.lerp(old.to(new.dtype), new, weight)
    return state
