"""Training on questions: what :mod:`clipmapper.commands.train` needs of it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import lightning
import torch
from rich.table import Table

from clipmapper.data.answer_rule import vqa_soft_accuracy
from clipmapper.data.readers.results import write_results
from clipmapper.data.records import RecordData, check_task
from clipmapper.data.shards.data import ShardData
from clipmapper.data.world.vqa import ScenesVQA, VQASplit
from clipmapper.errors import UserError
from clipmapper.models.build import build_clipmapper
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.vqa.batches import SplitBatches, scene_splits, training_batches
from clipmapper.tasks.vqa.blind import blind_accuracy
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.callback import RelevanceCallback
from clipmapper.training.encoder_tokens import token_store
from clipmapper.training.explained_records import samples_of
from clipmapper.training.processes import Share
from clipmapper.training.record_batches import RecordQuestions, question_batches
from clipmapper.training.record_tokens import check_room
from clipmapper.training.streamed import left_out_lines
from clipmapper.training.streamed_batches import StreamedQuestions, check_readers
from clipmapper.training.tables import accuracy_table, console
from clipmapper.training.task import Task, ValidationSubset

VALIDATION_SPLITS = ("validation", "held_out")


class VQATask(Task):
    """See :class:`~clipmapper.training.task.Task`."""

    objective = "accuracy/overall"

    def __init__(self, config: TrainConfig, data: ScenesVQA | RecordData) -> None:
        self.config, self.data = config, data
        self.validated = ValidationSubset(config.training.validation_samples, config.seed)
        if isinstance(data, RecordData):
            check_task(data, "vqa")
            self.validation_splits, self.workers = ("validation",), data.workers
            self._score = data.accuracy
            if isinstance(data, ShardData):
                check_readers(data, config.trainer.accumulate_grad_batches)
        else:
            self.validation_splits, self._score = VALIDATION_SPLITS, vqa_soft_accuracy
            self._check_families()
        self.model = build_clipmapper(asdict(config.encoder), asdict(config.model), data.answers)

    def _check_families(self) -> None:
        config, data = self.config, self.data
        for family in config.training.first_families:
            if family not in data.families:
                known = ", ".join(data.families)
                raise UserError(f"training.first_families: there is no {family!r}; the data has {known}")

    def prepare(self, explainer: RelevanceCallback | None, folder: Path) -> None:
        training = self.config.training
        if explainer is not None:
            samples = samples_of(self.model, self.data, "validation", explainer.samples, explainer.seed)
            explainer.prepare(samples, folder / "pictures")
        store = token_store(self.config, self.model.encoder, texts=True)
        if isinstance(self.data, RecordData):
            scored = {
                name: self.validated.of(name, records) if name in self.validation_splits else records
                for name, records in self.data.splits.items()
            }
            if store is not None:
                check_room(self.model.encoder, store, scored, self.data.decoding, texts=True)
            self.splits = {
                name: RecordQuestions(
                    self.model, records, self.data.vocabulary, name, store, self.data.decoding
                )
                for name, records in scored.items()
            }
            if isinstance(self.data, ShardData):
                self.splits["train"] = StreamedQuestions(self.model, self.data, self.config.seed, folder)
                self._batch_at = self.splits["train"].batches(training.batch_size)
                return
            self._batch_at = question_batches(
                self.splits["train"], batch_size=training.batch_size, seed=self.config.seed
            )
            return
        self.splits = scene_splits(self.model, self._scored_scenes(), store)
        self._batch_at = training_batches(
            self.splits["simple"],
            self.splits["train"],
            batch_size=training.batch_size,
            simple_steps=round(training.simple_share * training.max_steps),
            first_families=training.first_families,
            first_steps=round(training.first_share * training.max_steps),
            shares=asdict(training.shares),
            told_by_size=training.told_by_size,
            seed=self.config.seed,
        )

    def _scored_scenes(self) -> dict[str, VQASplit]:
        splits = {name: getattr(self.data, name) for name in ("simple", "train", *self.validation_splits)}
        return splits | {name: self.validated.of(name, splits[name]) for name in self.validation_splits}

    def module(self) -> VQAModule:
        training = self.config.training
        self._module = VQAModule(
            self.model,
            training.learning_rate,
            training.weight_decay,
            training.warmup_steps,
            training.max_steps,
            self.data.families,
            self.validation_splits,
            self._score,
        )
        return self._module

    def batch_at(self, step: int, share: Share) -> dict:
        return self._batch_at(step, share)

    def labelled(self, split: str) -> SplitBatches | RecordQuestions:
        return self.splits[split]

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``accuracy`` per family: how many validation questions, accuracy of every split, blind, chance.

        None where a split asks no question of a family, and where something is not known. Of data with ids
        also ``answers``, the files with what the model answered, in VQA's own format.
        """
        blind = self._blind() if self.config.training.blind_steps else {}
        asked = self.splits["validation"].split.family_counts()
        table = {}
        for family in (*self.data.families, "overall"):
            row = {"questions": sum(asked.values()) if family == "overall" else asked.get(family, 0)}
            for split in self.validation_splits:
                value = trainer.callback_metrics.get(f"{split}/accuracy/{family}")
                row[split] = None if value is None else float(value)
            row["blind"] = blind.get(family)
            if not isinstance(self.data, RecordData):
                row["chance"] = None if family == "overall" else self.data.chance[family]
            table[family] = row
        if not isinstance(self.data, RecordData):
            return {"accuracy": table}
        answered = {"validation": self._module.answered["validation"]}
        if "test" in self.splits:
            console().print("answers to the test split ...")
            answered["test"] = self._answers("test")
        for line in left_out_lines(folder):
            console().print(line, markup=False, soft_wrap=True)
        files = {}
        for split, answers in answered.items():
            files[split] = str(write_results(folder / f"answers_{split}.json", answers))
            console().print(f"answers, {split}: {files[split]}")
        return {"accuracy": table, "answers": files}

    @torch.no_grad()
    def _answers(self, split: str) -> list[tuple[int | str, str]]:
        found: list[tuple[int | str, str]] = []
        self._module.eval()
        for batch in self.splits[split].labelled(self.config.training.batch_size):
            batch = self._module.transfer_batch_to_device(batch, self.model.device, 0)
            best = self._module.logits(batch).argmax(dim=1).tolist()
            found += zip(batch["ids"], [self.model.answers[i] for i in best], strict=True)
        return found

    def _blind(self) -> dict[str, float]:
        console().print("question-only baseline ...")
        training = self.config.training
        return blind_accuracy(
            self.model,
            asdict(self.config.model),
            self.splits["train"],
            self.splits["validation"],
            steps=training.blind_steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            seed=self.config.seed,
            score=self._score,
        )

    def tables(self, results: Mapping) -> list[Table]:
        return [accuracy_table(results["accuracy"])]
