"""What a trained model is worth, for ``results.json`` and on the screen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from rich.table import Table

from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.registry import task_named
from clipmapper.training.batches import left_out_lines
from clipmapper.training.best import KeepBest
from clipmapper.training.callback import RelevanceCallback
from clipmapper.training.evaluated import Forwards
from clipmapper.training.interpolation import Interpolation
from clipmapper.training.measures import intervals, scores_table
from clipmapper.training.retrieval import ClipRetrieval
from clipmapper.training.run_folder import CHECKPOINT, FOUND, RESULTS, TAKEN
from clipmapper.training.shown import console
from clipmapper.training.task import TaskRun

_FEW = 100  # samples for validation, of fewer every score is shown with its interval
_CONFIDENCE = 0.95


@dataclass
class Trained:
    """A run behind its training, with the weights that are to be kept, of the file ``kept``."""

    config: TrainConfig
    run: TaskRun
    trainer: lightning.Trainer
    explainer: RelevanceCallback | None
    folder: Path
    kept: Path
    best: KeepBest | None
    interpolation: Interpolation | None
    clip: ClipRetrieval | None


def results_of(trained: Trained, settings: Mapping) -> tuple[dict, dict[str, Path]]:
    """The results and the files that they are about; prints both. ``settings``: those of the run."""
    run, folder, best, out = trained.run, trained.folder, trained.best, console()
    with torch.compiler.set_stance("force_eager"):
        scored = run.results(trained.trainer, folder)
    for line in left_out_lines(folder):
        out.print(line, soft_wrap=True)
    results: dict = {"name": trained.config.name, "settings": settings, **scored}
    if trained.config.init is not None:
        results["init"] = json.loads((folder / TAKEN).read_text())
    objective = f"{run.validation_splits[0]}/{run.objective}"
    results["objective"] = {"name": objective, "value": float(trained.trainer.callback_metrics[objective])}
    if (folder / FOUND).is_file():
        results["found"] = json.loads((folder / FOUND).read_text())
    files = {"checkpoint": trained.kept, "results": folder / RESULTS}
    if best is not None:
        results["best"] = best.results()
        out.print(best.line(), soft_wrap=True)
        files["last checkpoint"] = folder / CHECKPOINT
    if trained.interpolation is not None:
        results["interpolation"] = trained.interpolation.results()
        out.print(trained.interpolation.line(), soft_wrap=True)
    if trained.clip is not None:
        results["clip"] = trained.clip.results(run.model.encoder)
        out.print(trained.clip.line(results["clip"]), soft_wrap=True)
    if run.validated.counts:
        results["validated"] = run.validated.numbers()
    for table in run.tables(scored):
        if best is not None:
            table.title = f"{table.title}, of step {best.best[0]}"
        out.print(table)
    for line in [*run.validated.lines(), *run.warnings()]:
        out.print(line, soft_wrap=True)
    results |= _few(trained)
    explainer = trained.explainer
    if explainer is not None and explainer.report is not None:
        results["explanations"] = explainer.report.numbers(explainer.confidence, explainer.seed)
        for table in explainer.report.tables(results["explanations"]):
            out.print(table)
        files |= {"heat maps": folder / "pictures", "methods": folder / "pictures" / "methods.png"}
        files["perturbation curves"] = folder / "pictures" / explainer.report.curves
    return results, files


def _few(trained: Trained) -> dict:
    """Intervals of all scores where there are few samples for validation; they are printed, and how to know
    more."""
    run, split, seed = trained.run, trained.run.validation_splits[0], trained.config.seed
    records, said = run.splits[split].records, run.said(split)
    if said is None or len(records) >= _FEW:
        return {}
    evaluation = task_named(trained.config.training.task).evaluation(run.model, run.data, records, Forwards())
    found = intervals(evaluation.measures(said), _CONFIDENCE, seed)
    shown = {"split": split, "models": {trained.config.name: {"scores": found}}}
    table: Table = scores_table(shown, evaluation.titles, evaluation.noun, _CONFIDENCE)
    console().print(table)
    console().print(
        f"only {len(records)} {evaluation.noun} for validation: what these intervals do not tell apart may "
        f"be chance{_more_of(trained.config)}",
        soft_wrap=True,
    )
    return {"intervals": {"confidence": _CONFIDENCE, split: found}}


def _more_of(config: TrainConfig) -> str:
    if getattr(config.data, "folds", 0) is None:
        return "; data.folds=5 trains five times, and validates on all images"
    return ""
