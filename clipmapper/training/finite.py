"""A run stops before a step that would spoil its weights."""

from pathlib import Path

import lightning
import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.training.processes import from_all, in_any


class StopAtNonFinite(lightning.Callback):
    """Before every step of the optimiser: are the loss and the gradient numbers?

    If not, the step is not made, a checkpoint with the weights as they were is saved to ``path``, and the run
    ends with a ``UserError`` that names the samples (``batch["ids"]``) whose loss it was; where only the
    gradient is not finite, all samples of the step.

    In ``16-mixed`` a gradient may overflow: the loss scaler skips such a step by itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._batches: list[tuple[list, Tensor]] = []  # of this step: several with accumulated gradients
        self._ids: list = []

    def on_train_batch_start(self, trainer: lightning.Trainer, module, batch: dict, index: int) -> None:
        self._ids = list(batch["ids"])

    def on_before_backward(self, trainer: lightning.Trainer, module, loss: Tensor) -> None:
        self._batches.append((self._ids, loss.detach()))

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module, optimizer) -> None:
        batches, self._batches = self._batches, []
        losses = torch.stack([loss for _, loss in batches])
        total = losses.abs().sum()
        if trainer.scaler is None:
            total = total + _gradient_norm(module)
        if not in_any(not bool(total.isfinite())):
            return
        bad = [ids for (ids, _), fine in zip(batches, losses.isfinite().tolist(), strict=True) if not fine]
        named = [sample for part in from_all(bad) for ids in part for sample in ids]
        what = "the loss" if named else "the gradient"
        named = named or [sample for part in from_all(batches) for ids, _ in part for sample in ids]
        kept = f"{self.path} is from an earlier step"
        if not in_any(any(not weight.isfinite().all() for weight in module.parameters())):
            trainer.save_checkpoint(self.path)
            kept = f"the weights before it are in {self.path}"
        raise UserError(
            f"{what} of step {trainer.global_step + 1} is not a finite number; it was not made and {kept}. "
            f"Samples: {', '.join(map(str, named))}"
        )


def _gradient_norm(module: torch.nn.Module) -> Tensor:
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded weights: of all processes
