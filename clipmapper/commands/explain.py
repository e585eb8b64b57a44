"""The run behind ``scripts/explain.py``: one image, one question (or caption), one picture."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from clipmapper.errors import UserError
from clipmapper.host.outputs import check_folder
from clipmapper.relevance import COMPARED
from clipmapper.settings.commands import ExplainConfig, device_problems
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.explained import Explanation
from clipmapper.training.shown import console, files_table
from clipmapper.visual.explanation import plot_method_comparison
from clipmapper.visual.layout import picture_name, save_figure

# Settings that some tasks have.
_ASKED = ("question", "answer", "caption", "word", "word_weights", "word_maps", "explained")


def chosen_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps". Raises ``UserError`` for another name and for one that is not
    there."""
    for key, problem in device_problems(name):
        raise UserError(f"{key}: {problem}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"device={name}: not available here; use cpu or auto")
    return device


def explain_file(config: ExplainConfig) -> list[Path]:
    """Answer or caption, explain, write the pictures; returns their paths."""
    check_folder(Path(config.output), f"output={config.output}")
    model = load(config.checkpoint, chosen_device(config.device), config.architecture)
    task = task_of(model)
    given = {name: value for name in _ASKED if (value := getattr(config, name)) is not None}
    for name in given:
        if name not in task.explain_settings:
            raise UserError(
                f"{name}: this checkpoint {task.does}; it takes {', '.join(task.explain_settings)}"
            )
    methods = [config.method, *(m for m in COMPARED if config.compare and m != config.method)]
    explanations = task.explain(model, config.image, methods=methods, **given)
    first = explanations[0]
    # Images of one name may be in several folders.
    apart = "\0".join([os.path.abspath(config.image), *(f"{name}={given[name]}" for name in sorted(given))])
    stem = picture_name(Path(config.image).stem, *first.names, apart=apart)
    files = _pictures(config, stem, explanations)
    out = console()
    for line in first.lines():
        out.print(*line)
    out.print(files_table(files))
    return list(files.values())


def _pictures(config: ExplainConfig, stem: str, explanations: Sequence[Explanation]) -> dict[str, Path]:
    first, folder = explanations[0], Path(config.output)
    files = {first.method: first.plot(folder / f"{stem}_{first.method}.png")}
    if config.compare:
        figure = plot_method_comparison(
            first.image,
            {its.method: its.patches for its in explanations},
            {its.method: list(its.word_scores) for its in explanations},
            **first.header,
        )
        files["methods"] = save_figure(figure, folder / f"{stem}_methods.png")
    return files
