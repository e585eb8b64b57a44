"""Training on captions: what :mod:`clipmapper.commands.train` needs of it."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lightning
import torch
from rich.table import Table

from clipmapper.data.readers.results import write_captions_file
from clipmapper.data.records import RecordData, check_task
from clipmapper.data.shards.data import ShardData
from clipmapper.data.world.captioning import ScenesCaptions
from clipmapper.data.world.captions import where_words
from clipmapper.errors import UserError
from clipmapper.host.progress import counted
from clipmapper.models.build import build_captioner, load
from clipmapper.models.clip_weights import names_tokenizer
from clipmapper.settings.schema import ScenesCaptionTrainingConfig, TrainConfig
from clipmapper.tasks.captioning.batches import CaptionBatches, Stage, drawn_batches
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.self_critical import SelfCriticalModule
from clipmapper.tasks.captioning.training import SCORES, CaptionModule, JudgedCaption
from clipmapper.tasks.captioning.truth import (
    family_scores,
    family_table,
    sample_media,
    sample_rows,
    score_table,
    truth_numbers,
    truth_table,
)
from clipmapper.training.callback import RelevanceCallback
from clipmapper.training.encoder_tokens import ArrayImages, token_store
from clipmapper.training.explained_records import samples_of
from clipmapper.training.loggers import log_media
from clipmapper.training.processes import Share
from clipmapper.training.record_batches import RecordCaptions
from clipmapper.training.record_tokens import check_room
from clipmapper.training.streamed import left_out_lines
from clipmapper.training.streamed_batches import StreamedCaptions, check_readers
from clipmapper.training.tables import console
from clipmapper.training.task import Task, ValidationSubset
from clipmapper.training.token_room import check_tokens

VALIDATION_SPLITS = ("validation", "held_out")


class CaptionTask(Task):
    """See :class:`~clipmapper.training.task.Task`."""

    objective = "cider"

    def __init__(self, config: TrainConfig, data: ScenesCaptions | RecordData) -> None:
        self.config, self.data = config, data
        self.validated = ValidationSubset(config.training.validation_samples, config.seed)
        if isinstance(data, RecordData):
            check_task(data, "captioning")
            self.validation_splits, self.workers = ("validation",), data.workers
            if isinstance(data, ShardData):
                check_readers(data, config.trainer.accumulate_grad_batches)
        else:
            self.validation_splits = VALIDATION_SPLITS
        if config.training.checkpoint is None:
            captions = (
                counted(data.wordings(), "words of captions") if config.model.vocabulary == "data" else None
            )
            self.model = build_captioner(asdict(config.encoder), asdict(config.model), captions=captions)
        else:
            self.model = _loaded(config)

    def prepare(self, explainer: RelevanceCallback | None, folder: Path) -> None:
        training = self.config.training
        names = ("train", *self.validation_splits)
        store = token_store(self.config, self.model.encoder, texts=False)
        if isinstance(self.data, RecordData):
            there = {name: self.data.splits[name] for name in names if name in self.data.splits}
            there |= {name: self.validated.of(name, there[name]) for name in self.validation_splits}
            if store is not None:
                check_room(self.model.encoder, store, there, self.data.decoding, texts=False)
            self.splits = {
                name: RecordCaptions(self.model, records, name, store, self.data.decoding)
                for name, records in there.items()
            }
        else:
            scenes = {name: getattr(self.data, name) for name in (*names, "simple")}
            scenes |= {name: self.validated.of(name, scenes[name]) for name in self.validation_splits}
            if store is not None:
                visual = self.model.encoder.clip.visual
                images = {name: ArrayImages(split.images, visual) for name, split in scenes.items()}
                check_tokens(self.model.encoder, store, {name: (of, None) for name, of in images.items()})
            self.splits = {
                name: CaptionBatches(self.model, split, name, store) for name, split in scenes.items()
            }
        if explainer is not None:
            samples = samples_of(self.model, self.data, "validation", explainer.samples, explainer.seed)
            explainer.prepare(samples, folder / "pictures")
        # scst draws its own.
        captions = training.captions if training.objective == "cross_entropy" else 1
        if isinstance(self.data, ShardData):
            self.splits["train"] = StreamedCaptions(self.model, self.data, self.config.seed, folder)
            self._batch_at = self.splits["train"].batches(training.batch_size, captions)
            return
        self._batch_at = drawn_batches(
            self._stages(), batch_size=training.batch_size, captions=captions, seed=self.config.seed
        )

    def _stages(self) -> list[Stage]:
        """Simple scenes in the first wordings, then in all wordings, then all scenes."""
        train, training = self.splits["train"], self.config.training
        if not isinstance(training, ScenesCaptionTrainingConfig) or training.objective == "scst":
            return [Stage(train, train.split.draw)]
        shares = asdict(training.wordings)
        first = dict.fromkeys(training.first_wordings, 1.0) or shares
        first_until, simple_until = (
            round(share * training.max_steps) for share in (training.first_share, training.simple_share)
        )
        return [
            Stage(
                self.splits[name],
                partial(self.splits[name].split.draw, shares=wordings, left_to_right=training.left_to_right),
                until,
                self.splits[name].split.with_twins,
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
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
            "warmup_steps": training.warmup_steps,
            "max_steps": training.max_steps,
            "judges": {name: self.splits[name].split.truth for name in self.validation_splits},
        }
        if training.objective == "scst":
            self._module = SelfCriticalModule(
                **common,
                references=self.splits["train"].split.references,
                captions=training.scst_captions,
                seed=self.config.seed,
            )
        else:
            emphasised = {}
            if isinstance(training, ScenesCaptionTrainingConfig):
                emphasised = {"emphasised": where_words(), "emphasis": training.emphasis}
            self._module = CaptionModule(**common, label_smoothing=training.label_smoothing, **emphasised)
        return self._module

    def batch_at(self, step: int, share: Share) -> dict:
        return self._batch_at(step, share)

    def labelled(self, split: str) -> CaptionBatches | RecordCaptions:
        return self.splits[split]

    def results(self, trainer: lightning.Trainer, folder: Path) -> dict:
        """``captions`` by split: loss and scores of greedy captions, what of them is true, and samples.

        Of validation scenes also a drawn caption each: greedy captions come in the wordings that the model
        likes best, drawn ones in all. Where nobody knows whether a caption is true there are scores and
        samples alone, scores also by family (nocaps: domain) where there are several, and ``written``, a file
        with the captions in COCO's own format.
        """
        written = self._module.written
        splits: dict[str, dict] = {}
        known = not isinstance(self.data, RecordData)
        for split in self.validation_splits:
            metrics = {name: float(trainer.callback_metrics[f"{split}/{name}"]) for name in ("loss", *SCORES)}
            found = truth_numbers(written[split]) if known else {"captions": len(written[split])}
            splits[split] = metrics | {"greedy": found}
        if known:
            splits["validation"]["drawn"] = truth_numbers(self._drawn("validation"))
        batches = self.splits["validation"]
        rows = sample_rows(
            written["validation"][: self.config.training.logged_captions], batches.split.references
        )
        if rows:
            log_media(trainer.loggers, partial(sample_media, rows, batches.picture), step=trainer.global_step)
        if known:
            return {"captions": splits, "samples": rows}
        for line in left_out_lines(folder):
            console().print(line, markup=False, soft_wrap=True)
        if families := family_scores(written["validation"], batches.split.records):
            splits["validation"]["families"] = families
        file = folder / "captions_validation.json"
        ids = [record.id for record in batches.split.records]
        write_captions_file(file, [(ids[one.image], one.caption) for one in written["validation"]])
        console().print(f"captions, validation: {file}")
        return {"captions": splits, "samples": rows, "written": {"validation": str(file)}}

    def tables(self, results: Mapping) -> list[Table]:
        scores, validation = score_table(results["captions"]), results["captions"]["validation"]
        more = [truth_table(validation)] if "drawn" in validation else []
        more += [family_table(validation)] if "families" in validation else []
        return [scores, *more]

    @torch.no_grad()
    def _drawn(self, split: str) -> list[JudgedCaption]:
        found: list[JudgedCaption] = []
        for batch in self.splits[split].labelled(500):
            batch = self._module.transfer_batch_to_device(batch, self.model.device, 0)
            # The same words would be drawn for images at the same place of two batches: harmless.
            drawing = Decoding("nucleus", top_p=0.9, max_length=self.model.longest, seed=self.config.seed)
            captions = self._module.write(self._module.image_tokens(batch), drawing)
            found += self._module.judged(split, batch["numbers"], captions)
        return found


def _loaded(config: TrainConfig) -> Captioner:
    """The captioner of ``training.checkpoint``, which must be the one that the settings describe."""
    path = config.training.checkpoint
    own = config.encoder.architecture
    model = load(path, architecture=own if names_tokenizer(own) else None)
    if not isinstance(model, Captioner):
        raise UserError(f"training.checkpoint={path}: a model that answers questions, not a captioner")
    described = model.description
    for section in ("encoder", "model"):
        for key, value in asdict(getattr(config, section)).items():
            if key in described[section] and described[section][key] != value:
                raise UserError(
                    f"{section}.{key}={value}: the captioner of training.checkpoint={path} has "
                    f"{described[section][key]}"
                )
    return model
