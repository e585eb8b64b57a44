"""Training on questions, as :mod:`clipmapper.commands.train` wants it of a task."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import lightning
import torch
from rich.table import Table

from clipmapper.data.answer_rule import write_results
from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.vqa.batches import QuestionBatches, StreamedQuestions, drawn_batches, question_batches
from clipmapper.tasks.vqa.blind import blind_accuracy
from clipmapper.tasks.vqa.model import build_clipmapper
from clipmapper.tasks.vqa.tables import accuracy_table
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.encoder_tokens import token_store
from clipmapper.training.record_tokens import check_room
from clipmapper.training.streamed import left_out_lines
from clipmapper.training.tables import console
from clipmapper.training.task import TaskRun


class VQARun(TaskRun):
    """See :class:`~clipmapper.training.task.TaskRun`."""

    objective = "accuracy/overall"

    def __init__(self, config: TrainConfig, data: RecordData) -> None:
        super().__init__(config, data)
        if config.training.world:
            self._check_families()
        self.model = build_clipmapper(asdict(config.encoder), asdict(config.model), data.vocabulary.answers)

    def _check_families(self) -> None:
        for family in self.config.training.first_families:
            if family not in self.data.families:
                known = ", ".join(self.data.families)
                raise UserError(f"training.first_families: there is no {family!r}; the data has {known}")

    def prepare(self, folder: Path) -> None:
        training, data, seed = self.config.training, self.data, self.config.seed
        store = token_store(self.config, self.model.encoder, texts=True)
        scored = self.scored_splits()
        if store is not None:
            check_room(self.model.encoder, store, scored, data.reader(self.model.encoder), texts=True)
        self.splits = {
            name: QuestionBatches(self.model, data, name, records, store) for name, records in scored.items()
        }
        if data.stream is not None:
            self.splits["train"] = StreamedQuestions(self.model, data, seed, folder)
            self.batch_at = self.splits["train"].batches(training.batch_size)
        elif training.world:
            self.batch_at = drawn_batches(
                self.splits["simple"],
                self.splits["train"],
                batch_size=training.batch_size,
                simple_steps=round(training.simple_share * training.max_steps),
                first_families=training.first_families,
                first_steps=round(training.first_share * training.max_steps),
                shares=asdict(training.shares),
                told_by_size=training.told_by_size,
                seed=seed,
            )
        else:
            self.batch_at = question_batches(self.splits["train"], batch_size=training.batch_size, seed=seed)

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
            self.data.accuracy,
        )
        return self._module

    def labelled(self, split: str) -> QuestionBatches:
        return self.splits[split]

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``accuracy`` per family: how many validation questions, accuracy of every split, blind, and chance
        where it is known. None where a split asks no question of a family.

        ``answers``: the files with the model's answers, in VQA's own format.
        """
        blind = self._blind() if self.config.training.blind_steps else {}
        asked = self.splits["validation"].records.family_counts()
        table = {}
        for family in (*self.data.families, "overall"):
            row = {"questions": sum(asked.values()) if family == "overall" else asked.get(family, 0)}
            for split in self.validation_splits:
                value = trainer.callback_metrics.get(f"{split}/accuracy/{family}")
                row[split] = None if value is None else float(value)
            row["blind"] = blind.get(family)
            if self.data.chance:
                row["chance"] = self.data.chance.get(family)
            table[family] = row
        answered = {split: self._module.answered[split] for split in self.validation_splits}
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
            score=self.data.accuracy,
        )

    def tables(self, results: Mapping) -> list[Table]:
        return [accuracy_table(results["accuracy"])]
