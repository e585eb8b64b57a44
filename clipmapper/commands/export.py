"""The command behind ``scripts/export.py``: a trained model as a folder that others can load."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError, visible
from clipmapper.host.outputs import NO_ROOM, check_folder
from clipmapper.models.exported import (
    CARD,
    CONFIG,
    WEIGHTS,
    model_digest,
    model_path,
    read_model,
    write_model,
)
from clipmapper.settings.commands import ExportConfig
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.checkpoint_data import without_texts
from clipmapper.training.run_folder import BEST, RESULTS
from clipmapper.training.shown import console, files_table

_DEEP = 4  # of the numbers of results.json that a card shows
_LONG = 200  # characters of a name in it


def export_checkpoint(config: ExportConfig) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the card; returns the folder.

    The card says what ``results.json`` of the run says, if that lies where the run has left it. Raises
    ``UserError`` for a folder that has something else in it, and where there is no room.
    """
    folder, source = Path(config.folder), model_path(config.checkpoint)
    check_folder(folder, f"folder={config.folder}")
    if others := sorted({file.name for file in folder.glob("*")} - {CARD, CONFIG, WEIGHTS}):
        raise UserError(f"folder={config.folder}: has {others[0]} in it already; give a folder of its own")
    model = load(source, architecture=config.architecture)
    model.description = _to_give_away(model.description)
    card = model_card(model, source, folder.resolve().name)
    try:
        write_model(model, folder, card, precision=getattr(torch, config.precision))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room to write ({error.strerror}) in {folder}") from error
    read_model(folder)  # what is said to be there can be read
    out = console()
    out.print(files_table({"model": folder / WEIGHTS, "its sizes": folder / CONFIG, "card": folder / CARD}))
    return folder


def _to_give_away(description: Mapping) -> dict:
    """Without what is of this machine: where its data lay, and where the file of an architecture."""
    encoder, data = description["encoder"], description.get("data")
    if encoder["config"] is not None and Path(encoder["architecture"]).is_absolute():
        encoder = {**encoder, "architecture": Path(encoder["architecture"]).name}
    known = isinstance(data, Mapping) and isinstance(data.get("settings"), Mapping)
    return {**description, "encoder": encoder} | ({"data": without_texts(data)} if known else {})


def model_card(model: nn.Module, source: Path, name: str) -> str:
    """Say in Markdown what the model does, how it came to be and what it scored, as far as that is known."""
    task, described = task_of(model), model.description
    weights = sum(weight.numel() for weight in model.parameters())
    rows = {
        "task": f"{task.name}: it {task.does}",
        "encoder": described["encoder"]["architecture"],
        "mapper": ", ".join(
            f"{key} {value}" for key, value in described["model"].items() if value is not None
        ),
        "weights": f"{weights / 1e6:.2f} million",
        "made from": f"a checkpoint with the SHA-256 {model_digest(source)}",
        "exported": datetime.now(timezone.utc).date().isoformat(),
    }
    data = described.get("data")
    if isinstance(data, Mapping) and "name" in data:
        rows["trained on"] = f"data={data['name']}"
    results = _results(source)
    lines = [f"# {name}", "", "A model of clipmapper, which trains CLIPmapper and explains it.", ""]
    if results is None:
        lines += ["No scores are known: results.json was not beside the checkpoint.", ""]
    else:
        settings = results.get("settings", {})
        rows |= {key: settings[key] for key in ("name", "seed") if key in settings}
        best, began = results.get("best"), results.get("init")
        if source.name == BEST.name and isinstance(best, Mapping):
            rows["step"] = f"{best.get('step')}, the best validation by {best.get('monitor')}"
        elif isinstance(steps := settings.get("training", {}).get("max_steps"), int):
            rows["steps"] = steps
        if isinstance(began, Mapping):
            rows["began with"] = Path(str(began.get("from"))).name
        if "seconds" in results:
            rows["seconds of training"] = results["seconds"]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items()), ""]
    if results is not None:
        told = {key: results[key] for key in ("objective", *task.scores) if key in results}
        few = results.get("intervals")
        if isinstance(few, Mapping):
            told |= {f"interval {split}": found for split, found in few.items()}
        scores = dict(_numbers(told))
        lines += [
            "| score | |",
            "|---|---|",
            *(f"| {_cell(k)} | {_cell(v)} |" for k, v in scores.items()),
            "",
        ]
    lines += ["```python", "import clipmapper", "", f'model = clipmapper.load("{name}")', "```", ""]
    return "\n".join(lines)


def _results(source: Path) -> Mapping | None:
    """What the run of a checkpoint has left beside it."""
    file = source.parent.parent / RESULTS
    try:
        found = parsed_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _numbers(found: object, name: str = "", depth: int = _DEEP) -> Iterator[tuple[str, object]]:
    if isinstance(found, Mapping) and depth:
        for key, value in found.items():
            yield from _numbers(value, f"{name} {key}".strip(), depth - 1)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield name, round(found, 4)


def _cell(value: object) -> str:
    return visible(str(value))[:_LONG].replace("|", "\\|")
