"""Training CLIPmapper for visual question answering."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from clipmapper.data.answer_rule import VQASoftAccuracy, vqa_soft_accuracy
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import from_all


class VQAModule(TaskModule):
    """Binary cross-entropy on soft answer targets.

    A batch is a dictionary with ``targets`` Float[batch, answers] (soft accuracy of each answer) and either
    ``image_tokens``, ``text_tokens``, ``text_valid`` (of a frozen encoder, cached) or ``images`` and ``text``
    (:class:`~clipmapper.models.tokens.TokenizedText`). With ``image_of`` Int[batch], ``images`` are those
    that differ, and it says which each question asks about. For validation also ``answers`` (those that
    people gave, a list for each question), ``families`` and, where the data set has them, ``ids``.

    ``score``: how right an answer is, given those of people. ``answered`` holds (id, answer) of the last
    validation, by split.
    """

    def __init__(
        self,
        model: CLIPmapper,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_steps: int,
        families: Sequence[str],
        splits: Sequence[str] = ("validation",),
        score: Callable[[str, Sequence[str]], float] = vqa_soft_accuracy,
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, warmup_steps, max_steps)
        self.splits = tuple(splits)
        self.accuracy = torch.nn.ModuleDict(
            {split: MulticlassAccuracy(len(model.answers), average="micro") for split in splits}
        )
        self.answered: dict[str, list[tuple[int | str, str]]] = {}
        self.soft_accuracy = torch.nn.ModuleDict(
            {split: VQASoftAccuracy(tuple(families), score) for split in splits}
        )

    def logits(self, batch: Mapping) -> Float[Tensor, "batch answers"]:
        if "image_tokens" in batch:
            return self.model.answer_logits(batch["image_tokens"], batch["text_tokens"], batch["text_valid"])
        if "image_of" not in batch:
            return self.model(batch["images"], batch["text"])
        text, encoder = batch["text"], self.model.encoder
        image_tokens = encoder.image_tokens(batch["images"])[batch["image_of"]]
        return self.model.answer_logits(image_tokens, encoder.text_tokens(text.ids, text.valid), text.valid)

    def training_step(self, batch: Mapping, index: int) -> Tensor:
        loss = answer_loss(self.logits(batch), batch["targets"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["targets"]), sync_dist=True)
        return loss

    def validation_step(self, batch: Mapping, index: int, dataloader_idx: int = 0) -> None:
        logits = self.logits(batch)
        split = self.splits[dataloader_idx]
        found, best = logits.argmax(dim=1), batch["targets"].argmax(dim=1)
        # Where no right answer is in the vocabulary, any other than the one that is given stands for it.
        unknown = ~batch["targets"].any(dim=1)
        self.accuracy[split].update(logits, torch.where(unknown, (found + 1) % logits.shape[1], best))
        predictions = [self.model.answers[i] for i in found.tolist()]
        if "ids" in batch:
            self.answered[split] += zip(batch["ids"], predictions, strict=True)
        self.soft_accuracy[split].update(predictions, batch["answers"], batch["families"])
        loss = answer_loss(logits, batch["targets"])
        self.log(f"{split}/loss", loss, batch_size=len(logits), add_dataloader_idx=False, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.answered = {split: [] for split in self.splits}

    def on_validation_epoch_end(self) -> None:
        for split, mine in self.answered.items():
            # Shares are every so many rows of a split: put back in turn, they are in its order.
            parts = from_all(mine)
            longest = max(map(len, parts))
            self.answered[split] = [part[row] for row in range(longest) for part in parts if row < len(part)]
        for split in self.splits:
            if self.accuracy[split].update_called:
                self.log(f"{split}/top1", self.accuracy[split].compute())
                for group, value in self.soft_accuracy[split].compute().items():
                    if not value.isnan():  # no question of this family in the split
                        self.log(f"{split}/accuracy/{group}", value)
            self.accuracy[split].reset()
            self.soft_accuracy[split].reset()


def answer_loss(logits: Float[Tensor, "batch answers"], targets: Float[Tensor, "batch answers"]) -> Tensor:
    """Binary cross-entropy summed over answers, mean over the batch (the usual loss on VQA v2)."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss / len(logits)
