"""The part that the modules of all tasks share: the model, its optimiser, its description in a checkpoint."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset, get_worker_info

from clipmapper.models.checkpoint import DESCRIPTION
from clipmapper.models.encoder import learning_rate_scales, without_adapters
from clipmapper.models.tokens import TokenizedText
from clipmapper.training.processes import WHOLE, Share, batch_count, sum_of_all, this_share
from clipmapper.training.sharding import gathered, shard, with_state_of_all


class TaskModule(lightning.LightningModule):
    """A model in training: AdamW, warm-up, cosine, in steps. A batch is a dictionary.

    ``layer_decay``: of the encoder's learning rates
    (:func:`clipmapper.models.encoder.learning_rate_scales`), to be set before ``fit``.
    """

    layer_decay = 1.0

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int, max_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        self._plain = ExitStack()

    def configure_optimizers(self) -> dict:
        scales = learning_rate_scales(self.model.encoder, self.layer_decay)
        optimiser = adamw(self.model, self.learning_rate, self.weight_decay, scales=scales)
        if isinstance(self, FSDPModule):
            with_state_of_all(optimiser)
        schedule = warmup_cosine(optimiser, self.warmup_steps, self.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard(self, self.device_mesh["data_parallel"])

    def compile_trained(self) -> None:
        """``torch.compile`` what training runs, part by part, so that names of weights stay as they are."""
        encoder = self.model.encoder
        towers = () if encoder.frozen else (encoder.image_tower, encoder.text_tower)
        blocks = [block for tower in towers for block in tower.attention_blocks()]
        for part in (*blocks, *self.model.mapper.blocks, self.model.head):
            part.compile()

    def on_validation_start(self) -> None:
        """Validate and explain with a plain model: whole, without adapters, and not compiled."""
        self._plain.enter_context(gathered(self))
        self._plain.enter_context(without_adapters(self.model.encoder))
        self._plain.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self) -> None:
        self.leave_validation()

    def leave_validation(self) -> None:
        """Also of one that was broken off; without one it does nothing."""
        self._plain.close()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint[DESCRIPTION] = self.model.description

    def terms(self, batch: dict) -> int | float:
        """How many terms the loss of a batch is the mean of."""
        return len(batch["ids"])

    def weight(self, batch: dict) -> float:
        """Weigh the loss of a part, so that the mean over parts is the loss of the whole batch.

        Processes and accumulated gradients average the means of their parts as if each had equally many
        terms: of questions they have, of captions, whose terms are words, they have not.
        """
        parts = this_share().of * batch.get("parts", 1)
        return 1.0 if parts == 1 else self.terms(batch) * parts / sum_of_all(batch["parts_terms"])

    def transfer_batch_to_device(self, batch, device: torch.device, dataloader_idx: int):
        return {k: v.to(device) if isinstance(v, Tensor | TokenizedText) else v for k, v in batch.items()}


class StepBatches(IterableDataset):
    """Training batches as a function of the step: a resumed run sees what an uninterrupted one would.

    ``batch_at(step, share)`` makes a share of the batch of a step: that of this process, in as many parts as
    gradients are accumulated over. ``terms``: of :class:`TaskModule`.
    """

    def __init__(
        self,
        batch_at: Callable[[int, Share], dict],
        first_step: int,
        max_steps: int,
        share: Share = WHOLE,
        accumulated: int = 1,
        terms: Callable[[dict], int | float] = lambda batch: len(batch["ids"]),
    ) -> None:
        self.batch_at, self.first_step, self.max_steps = batch_at, first_step, max_steps
        self.terms = terms
        self.shares = [share.part(index, accumulated) for index in range(accumulated)]

    def __iter__(self) -> Iterator[dict]:
        # A DataLoader takes batches from its workers in turn: of all parts each worker makes every so many.
        # (A step of several parts is made by as many workers, because each part has to know all terms.)
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        made, parts = None, []
        for item in range(first, (self.max_steps - self.first_step) * len(self.shares), stride):
            step, index = divmod(item, len(self.shares))
            if step != made:
                made, parts = step, [self.batch_at(self.first_step + step, share) for share in self.shares]
            yield parts[index] | {"parts": len(parts), "parts_terms": sum(map(self.terms, parts))}


class Labelled(IterableDataset):
    """A share of a split in order, in batches with what validation needs: ``split.labelled``'s."""

    def __init__(self, split, share: Share = WHOLE) -> None:
        self.split, self.share = split, share

    def batches(self) -> int:
        """How many there are."""
        return batch_count(len(self.split.records), self.split.labelled_at_most, self.share)

    def __iter__(self) -> Iterator[dict]:
        return self.split.labelled(share=self.share)


def adamw(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    fused: bool | None = None,
    scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """AdamW over what takes a gradient; no decay on norms, biases, embeddings' vectors and scalars.

    ``scales``: of the learning rate, of parameters that have another than 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    trained = [p for p in module.parameters() if p.requires_grad]
    for weight in sorted(trained, key=lambda p: p.ndim < 2):  # with decay first; otherwise in their order
        key = (weight_decay if weight.ndim >= 2 else 0.0, scales.get(weight, 1.0))
        groups.setdefault(key, []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": decay, "lr": learning_rate * scale}
            for (decay, scale), weights in groups.items()
        ],
        lr=learning_rate,
        betas=betas,
        fused=fused,
    )


def warmup_cosine(
    optimiser: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a half cosine to zero; stepped once an optimiser step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
