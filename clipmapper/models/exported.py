"""A model as a folder that others can read: ``config.json``, ``model.safetensors`` and a card."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clipmapper.data.text_files import parsed_json
from clipmapper.host.outputs import write_whole
from clipmapper.models.weight_files import Unreadable, check_finite, check_tensors, read_torch_file
from clipmapper.shipped import shipped_root

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Under this key a checkpoint holds what it takes to rebuild the model.
DESCRIPTION = "clipmapper"
_CONFIG_BYTES = 1 << 28  # an answer vocabulary, or the merges of a tokenizer, are a few megabytes
# Rows of a token embedding that are zero are left out where they are most of it: the shipped CLIP was trained
# on the tokens of the built-in world alone, which are a few hundred of 49,408.
_EMBEDDINGS = ("encoder.clip.token_embedding", "encoder.clip.text.token_embedding")
_ROWS = ".rows"
_SPREAD = 64  # numbers of an embedding, at most, for a byte of the file


class ModelFile(NamedTuple):
    """What a file holds of a model. ``description``: not checked yet. ``state``: name → weights, checked.
    ``size``: in bytes."""

    description: object
    state: dict[str, Tensor]
    size: int


def shipped_models() -> tuple[str, ...]:
    """The names of the trained models that come with the program."""
    return tuple(sorted(file.parent.name for file in (shipped_root() / "checkpoints").glob(f"*/{CONFIG}")))


def model_path(given: str | Path) -> Path:
    """The file or folder that ``given`` names: a path, or one of :func:`shipped_models` where no path is
    called so."""
    path = Path(given).expanduser()
    if not path.exists() and str(given) in shipped_models():
        return shipped_root() / "checkpoints" / str(given)
    return path


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a model is read from: a checkpoint, or the two of a folder."""
    return (path / CONFIG, path / WEIGHTS) if path.is_dir() else (path,)


def model_digest(path: Path) -> str:
    """SHA-256 of what a model is read from."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_model(path: Path, *, whole: bool = True) -> ModelFile:
    """Read a checkpoint of a run, or an exported folder. No pickled code is run and nothing else is opened.

    Not ``whole``: the numbers stay on the disk and are not looked at.

    Raises ``Unreadable`` with one line for what is neither, is damaged, or holds numbers that are not finite.
    """
    description, state, size = _of_folder(path) if path.is_dir() else _of_checkpoint(path, mmap=not whole)
    check_tensors(state, 2 * size)  # half precision is given back as float32
    if whole:
        check_finite(state)
    return ModelFile(description, state, size)


def spread_embeddings(found: ModelFile, wanted: Mapping[str, Tensor]) -> None:
    """Put the rows of token embeddings that were written at their places; the others are zero.

    ``wanted``: weights of the sizes that the model has. Raises ``Unreadable`` where the rows do not fit, or
    would take many times the room of the file.
    """
    for name in _EMBEDDINGS:
        rows, weight = found.state.pop(name + _ROWS, None), found.state.get(f"{name}.weight")
        if rows is None:
            continue
        full = wanted.get(f"{name}.weight")
        if (
            full is None
            or weight is None
            or rows.dtype != torch.int64
            or rows.shape != weight.shape[:1]
            or weight.shape[1:] != full.shape[1:]
            or not bool(((rows >= 0) & (rows < len(full))).all())
            or not bool((rows.diff() > 0).all())
            or full.numel() > _SPREAD * found.size
        ):
            raise Unreadable(f"the weights {name}{_ROWS} do not fit the others")
        found.state[f"{name}.weight"] = torch.zeros(full.shape).index_copy(0, rows, weight)


def write_model(model: nn.Module, folder: Path, card: str, *, precision: torch.dtype = torch.float32) -> None:
    """Write a model (without adapters) and its card. ``precision``: of its weights in the file.

    The card comes last: a folder that has one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for name in _EMBEDDINGS:
        weight = state.get(f"{name}.weight")
        if weight is not None and 2 * len(rows := weight.any(dim=1).nonzero()[:, 0]) < len(weight):
            state[f"{name}.weight"], state[name + _ROWS] = weight[rows], rows
    state = {
        name: (value.to(precision) if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    write_whole(folder / CONFIG, json.dumps(model.description, indent=1, allow_nan=False) + "\n")
    # Not safetensors' own writing, whose errors do not tell a full disk from others.
    write_whole(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    write_whole(folder / CARD, card)


def _of_checkpoint(path: Path, mmap: bool) -> tuple[object, dict[str, Tensor], int]:
    checkpoint = read_torch_file(path, mmap=mmap)
    if not isinstance(checkpoint, dict) or not {DESCRIPTION, "state_dict"} <= set(checkpoint):
        raise Unreadable("it holds no model")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict):
        raise Unreadable("it holds no model")
    state = {
        str(name).removeprefix("model."): value
        for name, value in state.items()
        if str(name).startswith("model.")
    }
    return checkpoint[DESCRIPTION], state, path.stat().st_size


def _of_folder(folder: Path) -> tuple[object, dict[str, Tensor], int]:
    config, weights = files_of(folder)
    for file in (config, weights):
        if not file.is_file():
            raise Unreadable(f"a folder without {file.name}")
    if config.stat().st_size > _CONFIG_BYTES:
        raise Unreadable(f"{CONFIG} is larger than any description of a model")
    try:
        description = parsed_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{CONFIG} is no JSON") from error
    try:
        with safe_open(weights, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"{WEIGHTS} is damaged or cut short, or of another program") from error
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return description, state, weights.stat().st_size
