"""What the modules of all tasks share: the model, its optimiser and what a checkpoint says of it."""

from collections.abc import Iterator

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from clipmapper.models.build import DESCRIPTION
from clipmapper.models.tokens import TokenizedText
from clipmapper.training.optimisation import adamw, warmup_cosine


class TaskModule(lightning.LightningModule):
    """A model in training: AdamW, warm-up, cosine, in steps. A batch is a dictionary."""

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int, max_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.max_steps = warmup_steps, max_steps

    def configure_optimizers(self) -> dict:
        optimiser = adamw(self.model, self.learning_rate, self.weight_decay)
        schedule = warmup_cosine(optimiser, self.warmup_steps, self.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint[DESCRIPTION] = self.model.description

    def transfer_batch_to_device(self, batch, device: torch.device, dataloader_idx: int):
        return {k: v.to(device) if isinstance(v, Tensor | TokenizedText) else v for k, v in batch.items()}


class StepBatches(IterableDataset):
    """Training batches as a function of the step: a resumed run sees what an uninterrupted one would.

    ``batch_at(step)`` makes one batch.
    """

    def __init__(self, batch_at, first_step: int, max_steps: int) -> None:
        self.batch_at, self.first_step, self.max_steps = batch_at, first_step, max_steps

    def __iter__(self) -> Iterator[dict]:
        # A DataLoader takes batches from its workers in turn.
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.first_step + first, self.max_steps, stride):
            yield self.batch_at(step)


class Labelled(IterableDataset):
    """A split in order, in batches with what validation needs: those of ``split.labelled(batch_size)``."""

    def __init__(self, split, batch_size: int = 500) -> None:
        self.split, self.batch_size = split, batch_size

    def __iter__(self) -> Iterator[dict]:
        return self.split.labelled(self.batch_size)
