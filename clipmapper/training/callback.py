"""Explanations while training: maps, perturbation areas and localisation at validation time."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn

from clipmapper.errors import RunCutShort
from clipmapper.evaluation.explanation_scores.chosen import REMOVAL
from clipmapper.host.progress import progress
from clipmapper.relevance import method_named
from clipmapper.training.best import KeepBest
from clipmapper.training.explained import Report, Samples
from clipmapper.training.interruption import GracefulInterrupt
from clipmapper.training.loggers import log_media
from clipmapper.training.memory import explaining_line, out_of_memory
from clipmapper.training.processes import from_all, is_main, this_share
from clipmapper.training.task import Task

_CHUNK = 50  # samples that are settled together: what a trace of them keeps takes no more memory than a step


class _Told(Exception):
    """Explaining is to end, for the run is."""


class RelevanceCallback(lightning.Callback):
    """Explain ``samples`` validation questions (or images' captions) by every method and score the methods,
    every n validations.

    Scalars such as ``perturbation/image/positive/weighted`` (area of the soft accuracy) go to every logger,
    pictures to ``folder/pictures``, and to loggers that take them also a table with image, heat map, coloured
    question, answer, truth and curves (of captions: image, strip of maps, caption, references and curves).
    Training goes on as if the callback had not been there: no gradient, mode, flag or random state that it
    uses is touched.
    Of several processes each explains its part; the main one has the report of all, and writes.

    Parameters: ``methods`` by name (``UserError`` for an unknown one), ``pictures`` how many samples are
    drawn, ``batch_size`` perturbed variants a forward, ``confidence`` of the intervals, ``scores`` of
    explanations (:data:`~clipmapper.settings.keys.EXPLANATION_SCORES`); ``explained``
    and ``word_maps``, which some tasks have (:attr:`Task.perturb_settings`), None where the task
    is to choose.
    """

    def __init__(
        self,
        methods: Sequence[str],
        every_n_validations: int,
        samples: int,
        pictures: int,
        batch_size: int,
        confidence: float,
        seed: int,
        scores: Sequence[str] = (REMOVAL,),
        explained: str | None = None,
        word_maps: str | None = None,
    ) -> None:
        for method in methods:
            method_named(method)
        self.methods, self.scores = list(methods), list(scores)
        self.every_n_validations, self.samples, self.pictures = every_n_validations, samples, pictures
        self.batch_size, self.confidence, self.seed = batch_size, confidence, seed
        self.settings: Mapping[str, Any] = {"explained": explained, "word_maps": word_maps}
        self.validations = 0
        self.report: Report | None = None
        self.written: list[Path] = []
        self._prepared: tuple[Task, Samples, Path] | None = None

    def prepare(self, task: Task, samples: Samples, folder: Path) -> None:
        """Say which samples are explained, as samples of what, and where pictures go, before ``fit``.

        Raises ``UserError`` for settings that the task does not have.
        """
        self.settings = task.report_settings(self.settings, "callbacks.")
        task.check_explanation_scores(self.scores)
        self._prepared = task, samples, folder

    def state_dict(self) -> dict[str, int]:
        """So that a resumed run explains at the same validations as an uninterrupted one."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and trainer.global_step == 0:
            return
        self.validations += 1
        last = not fitting or trainer.global_step >= trainer.max_steps or trainer.should_stop
        if self.validations % self.every_n_validations and not last:
            return
        keeping = next((one for one in trainer.callbacks if isinstance(one, KeepBest)), None)
        if keeping is not None and last and not (keeping.is_best or keeping.over):
            return  # the best weights are put back, and explained then
        if self._prepared is None:
            raise ValueError("call RelevanceCallback.prepare(task, samples, folder) before fit")
        task, samples, folder = self._prepared
        mine = samples.part(this_share())
        stopping = next((one for one in trainer.callbacks if isinstance(one, GracefulInterrupt)), None)
        report, stopped = None, False
        try:
            report = None if mine is None else self._explain(task, module.model, mine, stopping)
        except _Told:
            stopped = True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunCutShort(explaining_line(self.batch_size)) from error
        told = from_all((report, stopped))
        if any(stopped for _, stopped in told):
            stopping.leave(f"stopped in the explanations after step {trainer.global_step}")
        reports = [part for part, _ in told if part is not None]
        if not is_main():
            return
        self.report = reports[0] if len(reports) == 1 else type(reports[0]).together(samples, reports)
        self.written = self.report.write(folder, count=self.pictures, confidence=self.confidence)
        loggers = trainer.loggers if keeping is None else [*trainer.loggers, *keeping.loggers]
        for logger in loggers:
            logger.log_metrics(self.report.scalars(), step=trainer.global_step)
        log_media(loggers, partial(self.report.media, folder), step=trainer.global_step)

    def _explain(
        self,
        task: Task,
        model: torch.nn.Module,
        samples: Samples,
        stopping: GracefulInterrupt | None,
    ) -> Report:
        """Raises ``_Told`` where the run is to be stopped."""
        total = samples.points(len(self.methods), self.scores)
        # Recording turns gradients on inside; under inference mode (Lightning's default) it could not.
        with (
            torch.inference_mode(False),
            progress("explanations, points of curves", total, hidden=not is_main()) as advance,
        ):

            def told(points: int) -> None:
                advance(points)
                if stopping is not None and stopping.told():
                    raise _Told

            return task.report(
                model,
                samples,
                self.methods,
                chunk=_CHUNK,
                batch_size=self.batch_size,
                seed=self.seed,
                scores=self.scores,
                progress=told,
                **self.settings,
            )
