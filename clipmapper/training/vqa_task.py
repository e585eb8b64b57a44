"""Training on questions: what :mod:`clipmapper.training.run` needs of it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import lightning
from rich.table import Table

from clipmapper.config import TrainConfig
from clipmapper.data.scenes_vqa import ScenesVQA
from clipmapper.errors import UserError
from clipmapper.models.build import build_clipmapper
from clipmapper.training.blind import blind_accuracy
from clipmapper.training.explained_samples import choose_samples
from clipmapper.training.processes import Share
from clipmapper.training.relevance_callback import RelevanceCallback
from clipmapper.training.scene_batches import SplitBatches, scene_splits, training_batches
from clipmapper.training.tables import accuracy_table, console
from clipmapper.training.task import Task
from clipmapper.training.vqa import VQAModule

VALIDATION_SPLITS = ("validation", "held_out")


class VQATask(Task):
    """See :class:`~clipmapper.training.task.Task`."""

    validation_splits = VALIDATION_SPLITS
    objective = "accuracy/overall"

    def __init__(self, config: TrainConfig, data: ScenesVQA) -> None:
        for family in config.training.first_families:
            if family not in data.families:
                known = ", ".join(data.families)
                raise UserError(f"training.first_families: there is no {family!r}; the data has {known}")
        self.config, self.data = config, data
        self.model = build_clipmapper(asdict(config.encoder), asdict(config.model), data.answers)

    def prepare(self, explainer: RelevanceCallback | None, folder: Path) -> None:
        training = self.config.training
        # The class token that CoCa's text tower appends would be cut off with a cached text's padding.
        cached = training.token_cache and not self.model.encoder.text_tower.appended_class_token
        self.splits = scene_splits(self.model, self.data, cached=cached and self.config.encoder.frozen)
        if explainer is not None:
            samples = choose_samples(self.model, self.data.validation, explainer.samples, explainer.seed)
            explainer.prepare(samples, folder / "pictures")
        self._batch_at = training_batches(
            self.splits["simple"],
            self.splits["train"],
            batch_size=training.batch_size,
            simple_steps=round(training.simple_share * training.max_steps),
            first_families=training.first_families,
            first_steps=round(training.first_share * training.max_steps),
            shares=asdict(training.shares),
            seed=self.config.seed,
        )

    def module(self) -> VQAModule:
        training = self.config.training
        return VQAModule(
            self.model,
            training.learning_rate,
            training.weight_decay,
            training.warmup_steps,
            training.max_steps,
            self.data.families,
            VALIDATION_SPLITS,
        )

    def batch_at(self, step: int, share: Share) -> dict:
        return self._batch_at(step, share)

    def labelled(self, split: str) -> SplitBatches:
        return self.splits[split]

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``accuracy`` per family: how many validation questions, accuracy of both splits, blind, chance.

        None where a split asks no question of a family.
        """
        console().print("question-only baseline ...")
        training = self.config.training
        blind = blind_accuracy(
            self.model,
            asdict(self.config.model),
            self.splits["train"],
            self.splits["validation"],
            steps=training.blind_steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            seed=self.config.seed,
        )
        asked = [q.family for q in self.data.validation.questions]
        table = {}
        for family in (*self.data.families, "overall"):
            row = {"questions": len(asked) if family == "overall" else asked.count(family)}
            for split in VALIDATION_SPLITS:
                value = trainer.callback_metrics.get(f"{split}/accuracy/{family}")
                row[split] = None if value is None else float(value)
            row["blind"] = blind.get(family)
            row["chance"] = None if family == "overall" else self.data.chance[family]
            table[family] = row
        return {"accuracy": table}

    def tables(self, results: Mapping) -> list[Table]:
        return [accuracy_table(results["accuracy"])]
