"""One model of a study: explained by every method and scored, and everything kept in one file."""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from clipmapper.commands.explain import chosen_device
from clipmapper.commands.study_models import CellModel, run_settings, trained
from clipmapper.data.records import RecordData
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.explanation_scores.planted import PLANTED
from clipmapper.evaluation.explanation_scores.sanity import unchanged
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.perturbation import finished_chunks
from clipmapper.evaluation.study.tables import StudyCell
from clipmapper.evaluation.study.values import StudyValues, side_by_side
from clipmapper.host.machine import commit, machine
from clipmapper.host.outputs import NO_ROOM, whole_file
from clipmapper.host.progress import progress
from clipmapper.models.exported import model_digest, model_path
from clipmapper.settings.study import StudyConfig
from clipmapper.shipped import shipped_root
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.explained import Report, Samples
from clipmapper.training.explained_values import LOCALISATION
from clipmapper.training.run_folder import only_one
from clipmapper.training.shown import console
from clipmapper.training.task import Task

VALUES = "values.npz"
_FORMAT = 1  # of the file; part of the key
_TIMED = 4  # samples that each method explains alone, to be timed
# Settings that the numbers of a model depend on.
_DECIDE = (
    "methods",
    "scores",
    "samples",
    "fewer",
    "judged",
    "split",
    "seed",
    "chunk",
    "data",
    "caption_scores",
    "word_maps",
)
_DECIDE_CHUNKS = ("methods", "split", "seed", "chunk", "data")
_TOGETHER = "f_syn"  # takes patches and words away together


@dataclass(frozen=True)
class KeptCell:
    """What the file of a model has. ``about``: ``key``, ``task``, times and the like, as in JSON."""

    values: StudyValues
    about: Mapping[str, Any]

    def of_study(self) -> StudyCell:
        about = self.about
        return StudyCell(
            about["name"], about["model"], self.values, about["unchanged"], about["seconds_a_sample"]
        )


def read_cell(folder: Path) -> KeptCell | None:
    """The file that :func:`run_cell` has left, None where there is none that can be read."""
    try:
        with (folder / VALUES).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
            return KeptCell(StudyValues.from_arrays(arrays), json.loads(str(arrays["about"])))
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def finished_cell(config: StudyConfig, cell: CellModel) -> KeptCell | None:
    """The same, if it is of these settings and this model. Neither trains nor loads a model."""
    kept = read_cell(cell.folder)
    if kept is None or kept.about["settings"] != _settings(config, cell):
        return None
    if cell.seed is None and kept.about["sha256"] != model_digest(model_path(cell.given)):
        return None
    return kept


def _settings(config: StudyConfig, cell: CellModel) -> dict:
    """What decides about the numbers: as JSON has it, for a comparison."""
    settings = asdict(config.for_model(cell.model))
    given: dict = {"format": _FORMAT} | {key: settings[key] for key in _DECIDE}
    given["training"] = None if cell.seed is None else run_settings(cell).name
    return json.loads(json.dumps(given, default=str))


def worked_off(config: StudyConfig, cell: CellModel) -> None:
    """One model, which no other process works at meanwhile."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cell.folder.mkdir(parents=True, exist_ok=True)
    with only_one(cell.folder):
        console().print(f"{cell.name}, in {cell.folder}", soft_wrap=True)
        run_cell(config, cell)
    gc.collect()  # models hold each other by hooks


def run_cell(config: StudyConfig, cell: CellModel) -> None:
    """Train the model where that is wanted and was not done; explain, score, time; write its file.

    Finished trainings and chunks of samples are taken up again. :class:`RunInterrupted` says what there is.
    """
    config = config.for_model(cell.model)
    path, results = (model_path(cell.given), {}) if cell.seed is None else trained(cell)
    given = cell.given if cell.seed is None else str(path)
    model = load(given, chosen_device(config.device))
    task = task_of(model)
    data_config = config.data
    if data_config is None and cell.seed is not None and not run_settings(cell).data.world:
        data_config = run_settings(cell).data
    data = data_for(task, model, data_config, given)
    sha256, settings = model_digest(path), _settings(config, cell)
    chunks = cell.folder / "chunks"
    if not config.resume:
        for file in chunks.rglob("chunk_*.npz"):
            file.unlink()
    scoring = _Scoring(config, cell, task, model, data, sha256)

    def kept() -> str:
        done = sum(finished_chunks(chunks, key) for key in scoring.keys)
        return f"{done} chunk{'' if done == 1 else 's'} saved" if done else "no chunk was finished"

    try:
        values = scoring.all()
        alone = _alone(config, task, model, data)
    except KeyboardInterrupt as stop:
        raise RunInterrupted(f"scoring {cell.name}: {kept()}") from stop
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room to write ({error.strerror}) in {cell.folder}; {kept()}") from error
    about = {
        "settings": settings,
        "name": cell.name,
        "model": cell.model,
        "seed": cell.seed,
        "task": task.name,
        "given": cell.given if cell.seed is None else list(cell.given),
        "sha256": sha256,
        "objective": results.get("objective"),
        "unchanged": scoring.unchanged,
        "seconds_a_sample": alone,
        "judged": scoring.judged,
        "seconds": ({"training": results["seconds"]} if results else {}) | scoring.seconds,
        "commit": commit(shipped_root()),
        "machine": machine(chosen_device(config.device)),
    }  # fmt: skip
    write_cell(cell.folder, values, about)


def write_cell(folder: Path, values: StudyValues, about: Mapping[str, Any]) -> None:
    """Complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / VALUES) as file:
        np.savez_compressed(file, **values.to_arrays(), about=np.array(json.dumps(about, allow_nan=False)))


class _Scoring:
    """The reports on one model: one for each number of samples that scores are of. ``sha``: the model's.

    Afterwards ``unchanged`` has the methods that fail the sanity check, ``judged`` section → score → what it
    is worth, ``seconds`` what each report took, and ``keys`` those of the chunks.
    """

    def __init__(
        self, config: StudyConfig, cell: CellModel, task: Task, model: nn.Module, data: RecordData, sha: str
    ) -> None:
        self._config, self._cell, self._task = config, cell, task
        self._model, self._data, self._sha = model, data, sha
        self.keys: list[str] = []
        self.unchanged: list[str] = []
        self.judged: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}

    def all(self) -> StudyValues:
        config, task = self._config, self._task
        scores = [one for one in config.scores if one != _TOGETHER or len(task.perturbed) > 1]
        task.check_explanation_scores(scores)
        of_count: dict[int, list[str]] = {config.samples: []}
        for score in scores:
            of_count.setdefault(config.fewer.get(score, config.samples), []).append(score)
        parts: list[tuple[str, str, ScoreValues]] = []
        first = None
        for count in sorted(of_count, reverse=True):
            began = time.monotonic()
            report = self._report(count, of_count[count])
            if first is None:
                first = report
                report.write(
                    self._cell.folder / "pictures", count=config.pictures, confidence=config.confidence
                )
            by_test = report.values_by_test()
            for test, by_score in by_test.items():
                parts += [
                    (self._section(test), score, values.part(config.methods))
                    for score, values in by_score.items()
                    if score != LOCALISATION or report is first
                ]
            if "sanity" in report.scored:
                self.unchanged = unchanged(report.scored["sanity"].of_methods)
            if self._judged(report.samples) and of_count[count]:
                for test, its in report.judged(config.confidence, config.seed).items():
                    section = self.judged.setdefault(self._section(test if test in by_test else ""), {})
                    for score, quantities in its["scores"].items():
                        section[score] = {"samples": its["samples"], "quantities": quantities}
            what = ", ".join(of_count[count]) or LOCALISATION
            self.seconds[f"{what} ({count} samples)"] = round(time.monotonic() - began, 1)
        return side_by_side(parts, np.array(first.samples.ids), first.groups())

    def _section(self, test: str) -> str:
        return f"{self._task.name}, {test}s" if test else self._task.name

    def _judged(self, samples: Samples) -> bool:
        return self._config.judged and not samples.undecided()

    def _report(self, count: int, scores: Sequence[str]) -> Report:
        config, task = self._config, self._task
        samples = task.samples(self._model, self._data, config.split, count, config.seed)
        if line := samples.note():
            console().print(line, soft_wrap=True)
        judged = self._judged(samples)
        if self._config.judged and not judged:
            console().print(
                f"judged: of {samples.undecided()} of {len(samples)} samples it is not known what decides; "
                "this model's scores are not judged",
                soft_wrap=True,
            )
        # Not of the list of scores, nor of how many samples others are: those may grow without a new start.
        depends = {key: value for key, value in asdict(config).items() if key in _DECIDE_CHUNKS}
        settings = _settings_of(task, config)
        depends |= {"sha256": self._sha, "samples": samples.digest()} | settings
        key = json.dumps(depends, sort_keys=True, default=str)
        self.keys.append(f"{key}, planted" if judged else key)  # as the report names its chunks
        total = samples.points(len(config.methods) + judged * len(PLANTED), scores)
        with progress(f"{self._cell.name}, {', '.join(scores) or LOCALISATION}", max(total, 1)) as advance:
            return task.report(
                self._model,
                samples,
                config.methods,
                chunk=config.chunk,
                batch_size=config.batch_size,
                seed=config.seed,
                scores=scores,
                planted=judged,
                folder=self._cell.folder / "chunks",
                key=key,
                progress=advance,
                **settings,
            )


def _settings_of(task: Task, config: StudyConfig) -> dict[str, Any]:
    """Those of the task's reports, the study's where it has them."""
    its = {"caption_scores": config.caption_scores, "word_maps": config.word_maps}
    return task.report_settings({name: value for name, value in its.items() if name in task.perturb_settings})


def _alone(config: StudyConfig, task: Task, model: nn.Module, data: RecordData) -> dict[str, float]:
    """Method → seconds a sample when it is the only one: recording and gradients are not shared then.

    On a CPU of this process's threads, which counts less of what others do meanwhile.
    """
    clock = time.perf_counter if next(model.parameters()).is_cuda else time.process_time
    samples = task.samples(model, data, config.split, _TIMED, config.seed)

    def explain(method: str) -> Callable[[], Report]:
        return lambda: task.report(
            model, samples, [method], chunk=_TIMED, batch_size=config.batch_size, seed=config.seed, scores=[],
            **_settings_of(task, config),
        )  # fmt: skip

    explain(config.methods[0])()  # what a first call prepares
    found = {}
    for method in config.methods:
        began = clock()
        explain(method)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[method] = (clock() - began) / len(samples)
    return found
