"""The run behind ``scripts/explain.py``: one image, one question (or caption), one picture."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.text import Text

from clipmapper.errors import UserError
from clipmapper.explaining import Explanation, explain_methods
from clipmapper.host.outputs import check_folder
from clipmapper.models.build import load
from clipmapper.settings.schema import COMPARED_METHODS, ExplainConfig, device_problem
from clipmapper.tasks.captioning.explain import CaptionExplanation, explain_caption_methods
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.training.tables import console, files_table
from clipmapper.visual.comparison import plot_method_comparison
from clipmapper.visual.files import picture_name, save_figure


def chosen_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps". Raises ``UserError`` for another name and for one that is not
    there."""
    if problem := device_problem(name):
        raise UserError(f"device: {problem}")
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
    methods = [config.method, *(m for m in COMPARED_METHODS if config.compare and m != config.method)]
    explain = _explain_caption if isinstance(model, Captioner) else _explain_answer
    return explain(model, config, methods)


def _explain_answer(model: CLIPmapper, config: ExplainConfig, methods: Sequence[str]) -> list[Path]:
    if config.caption is not None or config.word is not None:
        raise UserError("caption and word: this checkpoint answers questions, it writes no captions")
    if config.question is None:
        raise UserError("question: no value; this checkpoint answers questions, give one as question=…")
    explanations = explain_methods(model, config.image, config.question, methods, config.answer)
    first = explanations[0]
    stem = picture_name(Path(config.image).stem, config.question, apart=_file_and(config, config.answer))
    files = _pictures(config, stem, explanations, question=first.question, answer=first.answer)
    out = console()
    out.print(f"question: {config.question}")
    what = "explained answer" if config.answer is not None else "answer"
    out.print(f"{what}:", Text(first.answer, style="bold"), f"(probability {first.score:.3f})")
    words = "  ".join(f"{word} {score:.3f}" for word, score in first.words)
    out.print(f"relevance of words ({first.method}): {words}")
    out.print(files_table(files))
    return list(files.values())


def _explain_caption(model: Captioner, config: ExplainConfig, methods: Sequence[str]) -> list[Path]:
    if config.question is not None or config.answer is not None:
        raise UserError("question and answer: this checkpoint writes captions; give caption=… or none")
    word = config.word
    explanations = explain_caption_methods(
        model,
        config.image,
        methods,
        caption=config.caption,
        word=int(word) if word is not None and word.lstrip("-").isdigit() else word,
        word_weights=config.word_weights,
    )
    first = explanations[0]
    named = [Path(config.image).stem, first.caption, *([word] if word else [])]
    stem = picture_name(*named, apart=_file_and(config, config.word_weights))
    files = _pictures(config, stem, explanations, question=first.caption)
    out = console()
    what = "explained caption" if config.caption is not None else "caption"
    out.print(f"{what}:", Text(first.caption, style="bold"))
    told = zip(first.explained, first.probabilities, strict=True)
    words = "  ".join(f"{first.words[place]} {probability:.2f}" for place, probability in told)
    out.print(f"probability of words: {words}")
    out.print(files_table(files))
    return list(files.values())


def _pictures(
    config: ExplainConfig,
    stem: str,
    explanations: Sequence[Explanation | CaptionExplanation],
    *,
    question: str,
    answer: str | None = None,
) -> dict[str, Path]:
    first, folder = explanations[0], Path(config.output)
    files = {first.method: first.plot(folder / f"{stem}_{first.method}.png")}
    if config.compare:
        words = {e.method: e.words if isinstance(e, Explanation) else [] for e in explanations}
        figure = plot_method_comparison(
            first.image, {e.method: e.patches for e in explanations}, words, question=question, answer=answer
        )
        files["methods"] = save_figure(figure, folder / f"{stem}_methods.png")
    return files


def _file_and(config: ExplainConfig, more: str | None) -> str:
    """What tells pictures apart beside their texts: images of one name may be in several folders."""
    return "\0".join([os.path.abspath(config.image), more or ""])
