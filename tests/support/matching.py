"""A task that the package does not know: image-text matching (docs/add_a_task.md)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from rich.table import Table
from torch.nn.functional import cross_entropy

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import RecordData
from clipmapper.data.tables.base import RecordList
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.models.checkpoint import build_encoder, describe
from clipmapper.models.description import MAPPER, WIDTH, ModelRules
from clipmapper.models.tokens import tokenize
from clipmapper.settings.plain_values import section
from clipmapper.settings.schema import TrainingConfig
from clipmapper.tasks.vqa.explain import explain_answers
from clipmapper.tasks.vqa.model import CLIPmapper, build_mapper_and_head
from clipmapper.tasks.vqa.report import answer_report
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.tasks.vqa.settings import VQAModelConfig
from clipmapper.training.batches import SplitBatches, epochs
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import WHOLE
from clipmapper.training.task import Task, TaskRun

ANSWERS = ("no", "yes")


@dataclass
class MatchingModelConfig(VQAModelConfig):
    task = "matching"


@dataclass
class MatchingTrainingConfig(TrainingConfig):
    task = "matching"
    records = "captions"


class Matcher(CLIPmapper):
    task = "matching"


def matcher(encoder: Mapping, model: Mapping) -> Matcher:
    stage_1 = build_encoder(encoder)
    built = Matcher(stage_1, *build_mapper_and_head(stage_1, model, len(ANSWERS)), ANSWERS)
    built.description = describe("matching", stage_1, encoder, model)
    return built


def pairs(data: RecordData, name: str) -> RecordData:
    """Questions, of which samples can be drawn. Every second sentence is that of the next picture."""
    records = data.split(name)
    asked = [
        replace(
            record, captions=(), question=records[(n + n % 2) % len(records)].captions[0],
            answers=(ANSWERS[1 - n % 2],) * 10, truth=None,
        )
        for n, record in enumerate(records)
    ]  # fmt: skip
    made = RecordData({name: RecordList(asked)}, AnswerVocabulary(ANSWERS))
    made.reader = data.reader
    return made


class Pairs(SplitBatches):
    labelled_at_most = 64

    def __init__(self, model: Matcher, data: RecordData, name: str) -> None:
        self.model, self.reader = model, data.reader(model.encoder)
        self.records = pairs(data, name).split(name)

    def labelled_batch(self, rows) -> dict:
        some = [self.records[row] for row in rows]
        return {
            "ids": [record.id for record in some],
            "images": self.reader.many(some),
            "text": tokenize(self.model.encoder.tokenizer, [record.question for record in some]),
            "target": torch.tensor([ANSWERS.index(record.answers[0]) for record in some]),
        }


class MatchingModule(TaskModule):
    splits = ("validation", "held_out")

    def training_step(self, batch: Mapping, index: int) -> torch.Tensor:
        return cross_entropy(self.model(batch["images"], batch["text"]), batch["target"])

    def validation_step(self, batch: Mapping, index: int, dataloader_idx: int = 0) -> None:
        logits, split = self.model(batch["images"], batch["text"]), self.splits[dataloader_idx]
        right = (logits.argmax(1) == batch["target"]).float().mean()
        loss = cross_entropy(logits, batch["target"])
        self.log(f"{split}/accuracy", right, batch_size=len(logits), add_dataloader_idx=False)
        self.log(f"{split}/loss", loss, batch_size=len(logits), add_dataloader_idx=False)


class MatchingRun(TaskRun):
    objective = "accuracy"

    def __init__(self, config, data: RecordData) -> None:
        super().__init__(config, data)
        self.model = matcher(asdict(config.encoder), asdict(config.model))

    def prepare(self, folder) -> None:
        self.splits = {
            name: Pairs(self.model, self.data, name) for name in ("train", *self.validation_splits)
        }
        train, size = self.splits["train"], self.config.training.batch_size
        numbers_at = epochs(len(train.records), size, self.config.seed)
        self.batch_at = lambda step, share=WHOLE: train.labelled_batch(share.rows(numbers_at(step)))

    def module(self) -> MatchingModule:
        return MatchingModule(self.model, **self.schedule())

    def results(self, trainer, folder) -> dict:
        return {"matching": {k: float(v) for k, v in trainer.callback_metrics.items() if "accuracy" in k}}

    def tables(self, results: Mapping) -> list[Table]:
        return [Table(title=str(results["matching"]))]


class Matching(Task):
    name, does, records = "matching", "tells whether a sentence belongs to a picture", "captions"
    explain_settings = ("caption",)
    perturbed = MODALITIES

    run, report = staticmethod(MatchingRun), staticmethod(answer_report)

    def rules(self) -> ModelRules:
        return ModelRules(section(MAPPER | {"head_width": WIDTH}))

    def build(self, encoder, description) -> Matcher:
        return matcher(encoder, description["model"])

    def samples(self, model, data, split, count, seed):
        return question_samples(model, pairs(data, split), split, count, seed)

    def explain(self, model, image, caption, methods=("weighted",)):
        return explain_answers(model, image, caption, methods)
