"""Answering questions: what :class:`clipmapper.training.task.Task` asks of a task."""

from collections.abc import Mapping, Sequence

from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.models.description import MAPPER, WIDTH, ModelRules
from clipmapper.settings.plain_values import list_of, section, text
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.vqa.explain import Explanation, explain_answers
from clipmapper.tasks.vqa.model import CLIPmapper, build_clipmapper
from clipmapper.tasks.vqa.report import AnswerReport, answer_report
from clipmapper.tasks.vqa.run import VQARun
from clipmapper.tasks.vqa.samples import QuestionSamples, question_samples
from clipmapper.training.task import Task


class VQA(Task):
    """Visual question answering."""

    name = "vqa"
    does = "answers questions"
    records = "questions"
    explain_settings = ("question", "answer")

    def rules(self) -> ModelRules:
        return ModelRules(section(MAPPER | {"head_width": WIDTH}), {"answers": list_of(text(10_000), 1)})

    def build(self, encoder: Mapping, description: Mapping) -> CLIPmapper:
        return build_clipmapper(encoder, description["model"], description["answers"])

    def run(self, config: TrainConfig, data: RecordData) -> VQARun:
        return VQARun(config, data)

    def samples(
        self, model: CLIPmapper, data: RecordData, split: str, count: int, seed: int
    ) -> QuestionSamples:
        return question_samples(model, data, split, count, seed)

    def report(self, model, samples, methods, **how) -> AnswerReport:
        return answer_report(model, samples, methods, **how)

    def explain(
        self,
        model: CLIPmapper,
        image,
        question: str | None = None,
        methods: Sequence[str] = ("weighted",),
        answer: str | None = None,
    ) -> list[Explanation]:
        """``answer``: which to explain (default: the one that the model gives).

        Raises ``UserError`` for an answer outside the vocabulary or an empty question.
        """
        if question is None:
            raise UserError("question: no value; this model answers questions, give question=…")
        return explain_answers(model, image, question, methods, answer)


TASK = VQA()
