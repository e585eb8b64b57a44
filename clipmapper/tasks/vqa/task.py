"""Answering questions: the task (:class:`clipmapper.training.task.Task`), and a run of it on some data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import lightning
import torch
from rich.table import Table
from torch import nn

from clipmapper.data.answer_rule import write_results
from clipmapper.data.answers import AnswerVocabulary, questions_without_answer
from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.models.description import MAPPER, WIDTH, ModelRules
from clipmapper.settings.plain_values import list_of, section, text
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.vqa.batches import (
    QuestionBatches,
    StreamedQuestions,
    balanced_batches,
    drawn_batches,
    question_batches,
)
from clipmapper.tasks.vqa.blind import beyond_blind, blind_accuracies, blind_answers, unseeing_lines
from clipmapper.tasks.vqa.evaluation import AnswerEvaluation
from clipmapper.tasks.vqa.explain import explain_answers
from clipmapper.tasks.vqa.model import CLIPmapper, build_clipmapper, take_answers
from clipmapper.tasks.vqa.report import answer_report
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.evaluated import Forwards
from clipmapper.training.initial import Taken
from clipmapper.training.measures import Measures
from clipmapper.training.shown import console
from clipmapper.training.task import Task, TaskRun


class VQARun(TaskRun):
    """See :class:`~clipmapper.training.task.TaskRun`."""

    objective = "accuracy/overall"

    def __init__(self, config: TrainConfig, data: RecordData) -> None:
        super().__init__(config, data)
        self._warnings: list[str] = []
        if config.training.world:
            self._check_families()
        self.model = build_clipmapper(asdict(config.encoder), asdict(config.model), data.vocabulary.answers)

    def _check_families(self) -> None:
        for family in self.config.training.first_families:
            if family not in self.data.families:
                known = ", ".join(self.data.families)
                raise UserError(f"training.first_families: there is no {family!r}; the data has {known}")

    def take_head(self, other: nn.Module, taken: Taken) -> None:
        if other.task != self.model.task:
            super().take_head(other, taken)
            return
        take_answers(self.model, other, taken)
        train = self.data.splits.get("train")
        if train is not None and len(train):  # a stream is not looked through
            lost = questions_without_answer(train, AnswerVocabulary(other.answers, self.data.vocabulary.rule))
            share = taken.facts["questions_known"] = 1 - lost / len(train)
            taken.add("head", 0, 0, f"{100 * share:.1f} % of the training questions have a known one")

    def prepare(self, folder: Path) -> None:
        training, data, seed = self.config.training, self.data, self.config.seed
        scored = self.scored_splits()
        store = self.token_store(scored, texts=True)
        self.splits = {
            name: QuestionBatches(self.model, data, name, records, store) for name, records in scored.items()
        }
        self._train: QuestionBatches | StreamedQuestions
        if data.stream is not None:
            self._train = StreamedQuestions(self.model, data, seed, folder)
            self.batch_at = self._train.batches(training.batch_size)
            return
        self._train = self.splits["train"]
        if training.world:
            self.batch_at = drawn_batches(
                self.splits["simple"],
                self._train,
                batch_size=training.batch_size,
                simple_steps=round(training.simple_share * training.max_steps),
                first_families=training.first_families,
                first_steps=round(training.first_share * training.max_steps),
                shares=asdict(training.shares),
                told_by_size=training.told_by_size,
                seed=seed,
            )
        else:
            drawn = {"batch_size": training.batch_size, "seed": seed}
            if training.balance == "answers":
                self.batch_at = balanced_batches(self._train, **drawn)
            else:
                self.batch_at = question_batches(self._train, **drawn, together=training.questions_per_image)

    def module(self) -> VQAModule:
        self._module = VQAModule(
            self.model,
            **self.schedule(),
            families=self.data.families,
            splits=self.validation_splits,
            score=self.data.accuracy,
        )
        return self._module

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``accuracy`` per family: how many validation questions, accuracy of every split, blind, and chance
        where it is known. None where a split asks no question of a family.

        ``answers``: the files with the model's answers, in VQA's own format. ``beyond_blind``: the interval
        of the accuracy of validation less the baseline's.
        """
        blind_measures = (
            self._measures([[row] for row in self._blind()]) if self.config.training.blind_steps else {}
        )
        blind = blind_accuracies(blind_measures)
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
        files = {}
        for split, answers in answered.items():
            files[split] = str(write_results(folder / f"answers_{split}.json", answers))
            console().print(f"answers, {split}: {files[split]}")
        found = {"accuracy": table, "answers": files}
        if blind:
            measures = self._measures(self.said("validation"))
            found["beyond_blind"] = beyond_blind(measures, blind_measures, self.config.seed)
            self._warnings = unseeing_lines(measures, blind_measures, found["beyond_blind"])
        return found

    def warnings(self) -> list[str]:
        return self._warnings

    def said(self, split: str) -> list[list[int]]:
        rows = {answer: row for row, answer in enumerate(self.model.answers)}
        return [[rows[answer]] for _, answer in self._module.answered[split]]

    def _measures(self, said: Sequence) -> Measures:
        """Of answers to the validation questions."""
        return AnswerEvaluation(
            self.model, self.data, self.splits["validation"].records, Forwards()
        ).measures(said)

    @torch.no_grad()
    def _answers(self, split: str) -> list[tuple[int | str, str]]:
        found: list[tuple[int | str, str]] = []
        self._module.eval()
        for batch in self.splits[split].labelled(self.config.training.batch_size):
            batch = self._module.transfer_batch_to_device(batch, self.model.device, 0)
            best = self._module.logits(batch).argmax(dim=1).tolist()
            found += zip(batch["ids"], [self.model.answers[i] for i in best], strict=True)
        return found

    def _blind(self) -> list[int]:
        console().print("question-only baseline ...")
        training = self.config.training
        return blind_answers(
            self.model,
            asdict(self.config.model),
            self._train,
            self.splits["validation"],
            steps=training.blind_steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            seed=self.config.seed,
        )

    def tables(self, results: Mapping) -> list[Table]:
        return [accuracy_table(results["accuracy"])]


class VQA(Task):
    """Visual question answering."""

    name = "vqa"
    does = "answers questions"
    records = "questions"
    scores = ("accuracy",)
    explain_settings = ("question", "answer", "explained")
    perturbed = MODALITIES
    perturb_settings = MappingProxyType({"explained": "logit"})

    run, samples = VQARun, staticmethod(question_samples)
    report, explain = staticmethod(answer_report), staticmethod(explain_answers)
    evaluation = AnswerEvaluation

    def validation_scores(self, results: Mapping) -> Mapping[str, tuple[float | None, int]]:
        return {family: (row["validation"], 100) for family, row in results["accuracy"].items()}

    def rules(self) -> ModelRules:
        return ModelRules(section(MAPPER | {"head_width": WIDTH}), {"answers": list_of(text(10_000), 1)})

    def build(self, encoder: Mapping, description: Mapping) -> CLIPmapper:
        return build_clipmapper(encoder, description["model"], description["answers"])


TASK = VQA()


def accuracy_table(accuracy: Mapping) -> Table:
    """Accuracy per family; ``accuracy`` as in results.json."""
    table = Table(title="Accuracy (%)", title_justify="left")
    names = {"validation": "validation", "held_out": "held-out combinations", "blind": "blind"}
    names |= {"chance": "chance"}
    there = [key for key in names if any(row.get(key) is not None for row in accuracy.values())]
    for column in ("family", "questions", *(names[key] for key in there)):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, row in accuracy.items():
        cells = (row.get(key) for key in there)
        percent = ["" if value is None else f"{100 * value:.1f}" for value in cells]
        style = "bold" if family == "overall" else None
        table.add_row(family.replace("_", " "), str(row["questions"]), *percent, style=style)
    return table
