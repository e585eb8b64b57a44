"""The run behind ``scripts/explain.py``: one image, one question, one picture."""

import re
from pathlib import Path

import torch
from rich.markup import escape

from clipmapper.config import COMPARED_METHODS, ExplainConfig
from clipmapper.errors import UserError
from clipmapper.explaining import Explanation, explain_methods
from clipmapper.models.build import load
from clipmapper.training.tables import console, files_table
from clipmapper.visual.comparison import plot_method_comparison
from clipmapper.visual.files import save_figure


def chosen_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps". Raises ``UserError`` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"device={name}: not available here; use cpu or auto")
    return device


def explain_file(config: ExplainConfig) -> list[Path]:
    """Answer, explain, write the pictures; returns their paths."""
    model = load(config.checkpoint, chosen_device(config.device))
    methods = [config.method, *(m for m in COMPARED_METHODS if config.compare and m != config.method)]
    explanations = explain_methods(model, config.image, config.question, methods, config.answer)
    first = explanations[0]
    stem = f"{_slug(Path(config.image).stem)}_{_slug(config.question)}"
    folder = Path(config.output)
    files = {first.method: first.plot(folder / f"{stem}_{first.method}.png")}
    if config.compare:
        files["methods"] = folder / f"{stem}_methods.png"
        save_figure(_comparison(explanations), files["methods"])
    out = console()
    out.print(f"question: {escape(config.question)}")
    what = "explained answer" if config.answer is not None else "answer"
    out.print(f"{what}: [bold]{escape(first.answer)}[/bold] (probability {first.score:.3f})")
    words = "  ".join(f"{word} {score:.3f}" for word, score in first.words)
    out.print(f"relevance of words ({first.method}): {escape(words)}")
    out.print(files_table(files))
    return list(files.values())


def _comparison(explanations: list[Explanation]):
    first = explanations[0]
    return plot_method_comparison(
        first.image,
        {e.method: e.patches for e in explanations},
        {e.method: e.words for e in explanations},
        question=first.question,
        answer=first.answer,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50] or "image"
