"""Writing captions: the task (:class:`clipmapper.training.task.Task`), and a run of it on some data."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType

import lightning
import torch
from rich.table import Table
from torch import nn

from clipmapper.data.answer_rule import write_captions_file
from clipmapper.data.records import RecordData
from clipmapper.data.tables.base import Records
from clipmapper.data.world.captions import where_words
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.scores import check_scores
from clipmapper.host.progress import counted
from clipmapper.models.checkpoint import load_checkpoint
from clipmapper.models.clip_weights import names_tokenizer
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.captioning.batches import CaptionBatches, Stage, StreamedCaptions, drawn_batches
from clipmapper.tasks.captioning.build import DescribedCaptioner, build_captioner
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.evaluation import CaptionEvaluation
from clipmapper.tasks.captioning.explain import explain_captions
from clipmapper.tasks.captioning.head import take_words
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.perturbation import CAPTION_SCORES, TOLD
from clipmapper.tasks.captioning.report import caption_report
from clipmapper.tasks.captioning.results import (
    family_scores,
    family_table,
    sample_rows,
    score_table,
    truth_numbers,
    truth_table,
)
from clipmapper.tasks.captioning.samples import caption_samples
from clipmapper.tasks.captioning.training import SCORES, CaptionModule, JudgedCaption, SelfCriticalModule
from clipmapper.training.initial import Taken, take_alike
from clipmapper.training.loggers import log_media
from clipmapper.training.shown import Media, MediaTable, Picture, console
from clipmapper.training.task import Task, TaskRun


class CaptionRun(TaskRun):
    """See :class:`~clipmapper.training.task.TaskRun`."""

    objective = "cider"

    def __init__(self, config: TrainConfig, data: RecordData) -> None:
        super().__init__(config, data)
        if config.training.checkpoint is None:
            captions = (
                counted(data.wordings(), "words of captions") if config.model.vocabulary == "data" else None
            )
            self.model = build_captioner(asdict(config.encoder), asdict(config.model), captions=captions)
        else:
            self.model = _loaded(config)

    def take_head(self, other: nn.Module, taken: Taken) -> None:
        if other.task != self.model.task:
            super().take_head(other, taken)
            return
        take_words(self.model.head, other.head, taken)
        mine, its = getattr(self.model, "decoder", None), getattr(other, "decoder", None)
        if mine is not None and its is not None and mine.cross == its.cross:
            take_alike(mine, its, "decoder", taken)
        elif mine is not None:
            taken.nothing("decoder", mine, "that model has none of its kind")

    def prepare(self, folder: Path) -> None:
        training = self.config.training
        scored = {name: some for name, some in self.scored_splits().items() if name != "test"}
        store = self.token_store(scored, texts=False)
        self.splits = {
            name: CaptionBatches(self.model, self.data, name, records, store)
            for name, records in scored.items()
        }
        self._train: CaptionBatches | StreamedCaptions
        # scst draws its own.
        captions = training.captions if training.objective == "cross_entropy" else 1
        if self.data.stream is not None:
            self._train = StreamedCaptions(self.model, self.data, self.config.seed, folder)
            self.batch_at = self._train.batches(training.batch_size, captions)
            return
        self._train = self.splits["train"]
        self.batch_at = drawn_batches(
            self._stages(), batch_size=training.batch_size, captions=captions, seed=self.config.seed
        )

    def _stages(self) -> list[Stage]:
        """Simple scenes in the first wordings, then in all wordings, then all scenes."""
        training = self.config.training
        if not training.world or training.objective == "scst":
            return [Stage(self.splits["train"], _one_of(self.splits["train"].records))]
        shares = asdict(training.wordings)
        first = dict.fromkeys(training.first_wordings, 1.0) or shares
        first_until, simple_until = (
            round(share * training.max_steps) for share in (training.first_share, training.simple_share)
        )
        return [
            Stage(
                self.splits[name],
                _drawn_from(self.splits[name].records, wordings, training.left_to_right),
                until,
                [n for n, record in enumerate(self.splits[name].records) if record.truth.has_twins],
                training.twins,
            )
            for name, wordings, until in (
                ("simple", first, first_until),
                ("simple", shares, simple_until),
                ("train", shares, None),
            )
        ]

    def module(self) -> CaptionModule:
        training = self.config.training
        common = {
            "model": self.model,
            **self.schedule(),
            "judges": {name: _judge(self.splits[name].records) for name in self.validation_splits},
        }
        if training.objective == "scst":
            self._module = SelfCriticalModule(
                **common,
                references=self._train.references,
                captions=training.scst_captions,
                seed=self.config.seed,
            )
        else:
            emphasised = {}
            if training.world:
                emphasised = {"emphasised": where_words(), "emphasis": training.emphasis}
            self._module = CaptionModule(**common, label_smoothing=training.label_smoothing, **emphasised)
        return self._module

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``captions`` by split: loss and scores of greedy captions, what of them is true, and samples.

        Where it is known whether a caption is true also a drawn caption for each image of validation: greedy
        captions come in the wordings that the model likes best, drawn ones in all. Scores also by family
        (nocaps: domain) where there are several, and ``written``, a file with the captions in COCO's own
        format.
        """
        written = self._module.written
        splits: dict[str, dict] = {}
        for split in self.validation_splits:
            metrics = {name: float(trainer.callback_metrics[f"{split}/{name}"]) for name in ("loss", *SCORES)}
            known = self._module.judges[split] is not None
            found = truth_numbers(written[split]) if known else {"captions": len(written[split])}
            splits[split] = metrics | {"greedy": found}
        if self._module.judges["validation"] is not None:
            splits["validation"]["drawn"] = truth_numbers(self._drawn("validation"))
        batches = self.splits["validation"]
        rows = sample_rows(written["validation"][: self.config.training.logged_captions], batches.references)
        if rows:
            log_media(trainer.loggers, partial(_media, rows, batches), step=trainer.global_step)
        if families := family_scores(written["validation"], batches.records):
            splits["validation"]["families"] = families
        file = folder / "captions_validation.json"
        ids = [record.id for record in batches.records]
        write_captions_file(file, [(ids[one.image], one.caption) for one in written["validation"]])
        console().print(f"captions, validation: {file}")
        return {"captions": splits, "samples": rows, "written": {"validation": str(file)}}

    def said(self, split: str) -> list[str]:
        return [one.caption for one in self._module.written[split]]

    def tables(self, results: Mapping) -> list[Table]:
        scores, validation = score_table(results["captions"]), results["captions"]["validation"]
        more = [truth_table(validation)] if "drawn" in validation else []
        more += [family_table(validation)] if "families" in validation else []
        return [scores, *more]

    @torch.no_grad()
    def _drawn(self, split: str) -> list[JudgedCaption]:
        found: list[JudgedCaption] = []
        for batch in self.splits[split].labelled():
            batch = self._module.transfer_batch_to_device(batch, self.model.device, 0)
            # The same words would be drawn for images at the same place of two batches: harmless.
            drawing = Decoding("nucleus", top_p=0.9, max_length=self.model.longest, seed=self.config.seed)
            captions = self._module.write(self._module.image_tokens(batch), drawing)
            found += self._module.judged(split, batch["numbers"], captions)
        return found


def _media(rows: Sequence[Mapping], batches: CaptionBatches) -> Media:
    """A table of images and their captions."""
    shown = [{**row, "image": Picture(batches.picture(row["image"]))} for row in rows]
    return {"captions": MediaTable(list(rows[0]), shown)}


def _one_of(records: Records) -> Callable[[int, random.Random], str]:
    """A caption to train on, of those that people wrote."""
    return lambda image, rng: rng.choice(records[image].captions)


def _drawn_from(
    records: Records, shares: Mapping[str, float], left_to_right: bool
) -> Callable[[int, random.Random], str]:
    """A caption to train on, in a wording of its own each time."""
    return lambda image, rng: records[image].truth.draw(rng, shares, left_to_right)


def _judge(records: Records) -> Callable | None:
    """Whether a caption of an image is so; None where nobody knows it."""
    if not hasattr(records[0].truth, "judge"):
        return None
    return lambda image, caption: records[image].truth.judge(caption)


def _loaded(config: TrainConfig) -> Captioner:
    """The captioner of ``training.checkpoint``, which must be the one that the settings describe."""
    path = config.training.checkpoint
    own = config.encoder.architecture
    try:
        model = load_checkpoint(
            path,
            _captioner_named,
            None,
            architecture=own if names_tokenizer(own) else None,
        )
    except UserError as error:
        raise UserError(f"training.{error}") from error
    described = model.description
    for section in ("encoder", "model"):
        for key, value in asdict(getattr(config, section)).items():
            if key in described[section] and described[section][key] != value:
                raise UserError(
                    f"{section}.{key}={value}: the captioner of training.checkpoint={path} has "
                    f"{described[section][key]}"
                )
    return model


def _captioner_named(name: str) -> DescribedCaptioner:
    if name != Captioner.task:
        raise UserError(f"a model for the task {name}, not a captioner")
    return DescribedCaptioner()


class Captioning(DescribedCaptioner, Task):
    """Image captioning."""

    name = "captioning"
    does = "writes captions"
    records = "captions"
    scores = ("captions",)
    explain_settings = ("caption", "word", "word_weights", "word_maps", "explained")
    perturb_settings = MappingProxyType(
        {
            "explained": "logit",
            "word_maps": "scaled",
            "word_weights": "mean",
            "caption_scores": list(CAPTION_SCORES),
        }
    )

    run, samples = CaptionRun, staticmethod(caption_samples)
    report, explain = staticmethod(caption_report), staticmethod(explain_captions)
    evaluation = CaptionEvaluation

    def validation_scores(self, results: Mapping) -> Mapping[str, tuple[float | None, int]]:
        found = results["captions"]["validation"]
        told = found | found["greedy"]
        return {
            title: (told[name], factor)
            for name, (title, factor) in self.evaluation.titles.items()
            if name in told
        }

    def check_settings(self, **settings) -> None:
        """Raise ``UserError`` for a score that there is not, or that needs a Java that is not there."""
        scores = settings.get("caption_scores", ())
        try:
            check_scores([score for score in scores if score not in TOLD])
        except UserError as error:
            raise UserError(f"caption_scores: {error}") from error


TASK = Captioning()
