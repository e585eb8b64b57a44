"""The run behind ``scripts/evaluate.py``: trained models on any data set, scored, compared, written down."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from clipmapper.commands.perturb import explanation_scores
from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.host.outputs import check_folder
from clipmapper.host.progress import progress
from clipmapper.host.stopping import forks_ignore_signals
from clipmapper.models.exported import model_digest, model_path
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.settings.commands import EvaluateConfig, PerturbConfig
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.endings import Unfinished, ending, give_up
from clipmapper.training.evaluated import Chunks, Evaluation, Forwards, records_of
from clipmapper.training.launching import less_noise, start_processes
from clipmapper.training.measures import Measures, differences, intervals, scores_table
from clipmapper.training.processes import in_main, is_main
from clipmapper.training.run_folder import CHECKPOINT, RESULTS, only_one, write_json
from clipmapper.training.shown import console, files_table
from clipmapper.training.task import Task

_CHUNK = 50  # samples between two savings of explanations, as `clipmapper perturb` has them
_VARIANTS = 512  # perturbed samples in one forward, as there


@dataclass
class _Unfinished(Unfinished):
    config: EvaluateConfig
    chunks: list[Chunks] = field(default_factory=list)

    @property
    def patience(self) -> str:
        return f"{self.config.timeout_minutes:g} minutes"

    def way_on(self) -> str:
        saved = sum(chunks.saved() for chunks in self.chunks)
        if not saved:
            return "nothing was saved: no chunk was finished"
        return (
            f"what is said of {saved:,} samples is saved in {Path(self.config.output, 'chunks')}: the same "
            "command with resume=true goes on"
        )


def evaluate(config: EvaluateConfig) -> Path:
    """Score models on a split of the settings' data or of the first checkpoint's own world; print the tables,
    write ``results.json`` and a file of answers (captions) of each. Returns the folder.

    Finished chunks are kept in ``output/chunks``; with ``resume`` an evaluation that was stopped takes them
    up again, with any number of devices.
    """
    with forks_ignore_signals():
        unfinished = _Unfinished(config)
        try:
            check_folder(Path(config.output), f"output={config.output}")
            device, unfinished.companions = start_processes(config, named="")
            unfinished.companions.watch(lambda: give_up(unfinished))
            with ExitStack() as until_the_end:
                until_the_end.enter_context(cut_texts_said_once(is_main()))
                until_the_end.enter_context(less_noise())
                return _evaluate(config, device, unfinished, until_the_end)
        except BaseException as error:
            end = ending(error, unfinished)
            if isinstance(error, KeyboardInterrupt):
                unfinished.companions.kill_own()  # every file is whole
                if not is_main():
                    end = SystemExit(130)  # the main process is not to wait for this one
            if end is error:
                raise
            raise end from error
        finally:
            unfinished.companions.end()


@dataclass
class _Subject:
    """One of the models: its ``name`` in tables and files, and what it says about every record."""

    name: str
    path: Path
    digest: str
    chunks: Chunks
    said: list = field(default_factory=list)

    @property
    def evaluation(self) -> Evaluation:
        return self.chunks.evaluation


def _evaluate(
    config: EvaluateConfig, device: torch.device, unfinished: _Unfinished, until_the_end: ExitStack
) -> Path:
    began = time.monotonic()
    folder, out = Path(config.output), console()
    in_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    in_main(lambda: until_the_end.enter_context(only_one(folder)))
    paths = [model_path(given) for given in config.checkpoint]
    names = model_names(paths)
    # All models before the data, which may take long to read.
    models = [load(given, device, config.architecture) for given in config.checkpoint]
    task = _common_task(config, models)
    if config.explain:
        task.report_settings({"explained": config.explained})
    data = data_for(task, models[0], config.data, config.checkpoint[0])
    records = records_of(data, config.split)
    for line in data.notes:
        out.print(line)
    forwards = Forwards(config.precision, config.token_precision)
    subjects = [
        _subject(config, name, path, task.evaluation(model, data, records, forwards))
        for name, path, model in zip(names, paths, models, strict=True)
    ]
    unfinished.chunks = [subject.chunks for subject in subjects]
    if not config.resume:
        in_main(lambda: _forget(folder / "chunks"))
    for subject in subjects:
        what = f"evaluating {subject.name}, {subject.evaluation.noun}"
        with progress(what, subject.chunks.share(), hidden=not is_main()) as advance:
            subject.chunks.make(advance)
    if not is_main():
        return folder
    for subject in subjects:
        subject.said = subject.chunks.all(unfinished.companions)
    unfinished.companions.end()
    results = {"settings": asdict(config), "split": config.split, "samples": len(records)}
    files = {"results": folder / RESULTS}
    results |= _scores(config, subjects, files)
    if config.explain and results["scored"]:
        write_json(folder / RESULTS, results)  # explanations take long
        results["explanations"] = {
            subject.name: _explained(config, task, subject, data, given)
            for subject, given in zip(subjects, config.checkpoint, strict=True)
        }
        files["explanations"] = folder / "explanations"
    elif config.explain:
        out.print("explain=true: nothing is explained, for explanations are scored by what is right")
    results["files"] = {what: str(path) for what, path in files.items()}
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(folder / RESULTS, results)
    out.print(files_table(files))
    return folder


def _common_task(config: EvaluateConfig, models: Sequence[nn.Module]) -> Task:
    tasks = [task_of(model) for model in models]
    for given, task in zip(config.checkpoint, tasks, strict=True):
        if task is not tasks[0]:
            raise UserError(
                f"checkpoint={given}: it {task.does}, but {config.checkpoint[0]} {tasks[0].does}; models of "
                "one task are compared"
            )
    return tasks[0]


def _subject(config: EvaluateConfig, name: str, path: Path, evaluation: Evaluation) -> _Subject:
    digest = model_digest(path)
    key = {"checkpoint": digest} | {
        one: getattr(config, one) for one in ("split", "batch_size", "precision", "token_precision")
    }
    folder = Path(config.output) / "chunks" / name
    return _Subject(name, path, digest, Chunks(folder, key, evaluation, config.batch_size, config.chunk))


def _forget(chunks: Path) -> None:
    for file in chunks.rglob("chunk_*.json"):
        file.unlink()


def _scores(config: EvaluateConfig, subjects: Sequence[_Subject], files: dict[str, Path]) -> dict:
    """Write what was said; score and print it as far as it is known what is right."""
    folder, out = Path(config.output), console()
    first = subjects[0].evaluation
    models: dict[str, dict] = {}
    for subject in subjects:
        stem = f"{first.file}_{subject.name}_{config.split}.json"
        file = subject.evaluation.write(subject.said, folder / stem)
        files[f"{first.file}, {subject.name}"] = file
        models[subject.name] = {"checkpoint": str(subject.path), "sha256": subject.digest, "file": str(file)}
    scored, count = len(first.scored()), len(first.records)
    if scored < count:
        what = "none" if not scored else f"{scored:,}"
        out.print(
            f"split={config.split}: {what} of {count:,} {first.noun} have {first.file} of people to score "
            f"against; the {first.file} of all are written, for an upload",
            soft_wrap=True,
        )
    results: dict = {"scored": scored, "models": models}
    if not scored:
        return results
    of_each: dict[str, Measures] = {s.name: s.evaluation.measures(s.said) for s in subjects}
    for subject in subjects:
        more = subject.evaluation.more(subject.said, config.confidence, config.seed)
        scores = intervals(of_each[subject.name], config.confidence, config.seed)
        models[subject.name] |= {"scores": scores} | more
    if len(subjects) > 1:
        reference = of_each[subjects[0].name]
        results["difference_to"] = subjects[0].name
        results["differences"] = {
            subject.name: differences(of_each[subject.name], reference, config.confidence, config.seed)
            for subject in subjects[1:]
        }
    told = results | {"split": config.split}
    out.print(scores_table(told, first.titles, first.noun, config.confidence))
    for subject in subjects:
        for shown in subject.evaluation.shown(subject.name, models[subject.name]):
            out.print(shown)
    return results


def _explained(
    config: EvaluateConfig, task: Task, subject: _Subject, data: RecordData, given: str
) -> Mapping:
    """The scores of explanations of one model, as ``clipmapper perturb`` has them."""
    settings = PerturbConfig(
        checkpoint=given,
        architecture=config.architecture,
        data=config.data,
        methods=config.methods,
        scores=config.scores,
        samples=config.samples,
        split=config.split,
        explained=config.explained,
        word_weights=None,
        word_maps=None,
        caption_scores=None,
        output=str(Path(config.output) / "explanations" / subject.name),
        resume=config.resume,
        batch_size=config.batch_size or _VARIANTS,
        chunk=_CHUNK,
        confidence=config.confidence,
        seed=config.seed,
        device="auto",
    )
    console().print(f"explanations of {subject.name}")
    return explanation_scores(settings, task, subject.evaluation.model, data)


def model_names(paths: Sequence[Path]) -> list[str]:
    """A name for each model that tells it from the others and can be part of a file's: of its path as many
    parts as that takes, from the last on."""
    last = [path.name if path.is_dir() else path.stem for path in paths]
    parts = [
        [part for part in (*path.resolve().parent.parts, name) if part != CHECKPOINT.parent.name]
        for path, name in zip(paths, last, strict=True)
    ]
    names = []
    for number, mine in enumerate(parts):
        others = parts[:number] + parts[number + 1 :]
        count = 1
        while count < len(mine) and any(mine[-count:] == its[-count:] for its in others):
            count += 1
        name = re.sub(r"[^\w.+-]+", "_", "_".join(mine[-count:])).strip("_.") or "model"
        name, again = name[-80:], 2
        while name.lower() in (taken.lower() for taken in names):
            name, again = f"{name}_{again}", again + 1
        names.append(name)
    return names
