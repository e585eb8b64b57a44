"""A trained model from a checkpoint that may be anybody's, and what a checkpoint says of its model."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from open_clip.model import set_model_preprocess_cfg
from torch import nn

from clipmapper.errors import UserError
from clipmapper.models.clip_weights import architecture_config
from clipmapper.models.description import PREPROCESS, ModelRules, check_description, check_task
from clipmapper.models.encoder import ClipEncoder, choose_trained, merge_adapters
from clipmapper.models.exported import (
    ModelFile,
    model_path,
    read_model,
    shipped_models,
    spread_embeddings,
)
from clipmapper.models.mapper import MAPPERS, Mapper
from clipmapper.models.weight_files import Unreadable, check_sizes

# What a description says of the encoder only where it is chosen.
_CHOSEN = ("image_size", "trained_blocks", "lora_rank")


def build_encoder(encoder: Mapping) -> ClipEncoder:
    """Stage 1.

    ``encoder``: architecture, pretrained, frozen; where they are not None, image_size, and of one that is not
    frozen trained_blocks and lora_rank (:func:`clipmapper.models.encoder.choose_trained`).
    """
    built = ClipEncoder(
        encoder["architecture"], encoder["pretrained"], encoder["frozen"], encoder.get("image_size")
    )
    if not encoder["frozen"]:
        choose_trained(built, encoder.get("trained_blocks"), encoder.get("lora_rank"))
    return built


def build_mapper(
    encoder: ClipEncoder, model: Mapping, captioning: bool = False, text_width: int | None = None
) -> Mapper:
    """Stage 2 with new weights. ``model``: mapper ("dual_flow" or "single_flow"), width, depth, heads,
    mlp_ratio, image_position_embedding. ``text_width``: of the words that it is given; None: the encoder's.
    """
    return MAPPERS[model["mapper"]](
        encoder.image_width,
        encoder.text_width if text_width is None else text_width,
        encoder.grid,
        width=model["width"],
        depth=model["depth"],
        heads=model["heads"],
        mlp_ratio=model["mlp_ratio"],
        class_token=encoder.prefix_tokens == 0,
        image_position_embedding=model["image_position_embedding"],
        captioning=captioning,
    )


def describe(task: str, stage_1: ClipEncoder, encoder: Mapping, model: Mapping, **more) -> dict:
    """Everything but the weights, in plain types; an architecture of one's own goes in whole.

    ``more``: what the task's model needs besides (the answers, the tokens of the head).
    """
    architecture = encoder["architecture"]
    config = architecture_config(architecture) if architecture.endswith(".json") else None
    preprocess = {key: stage_1.clip.visual.preprocess_cfg[key] for key in PREPROCESS}
    return {
        "task": task,
        "encoder": {"architecture": architecture, "frozen": encoder["frozen"], "config": config}
        | {key: encoder[key] for key in _CHOSEN if encoder.get(key) is not None}
        | {"preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess.items()}},
        "tokenizer": Path(architecture).stem if config else architecture,
        "model": dict(model),
        **more,
    }


@runtime_checkable
class Buildable(Protocol):
    """The part of a task that loading needs: :class:`clipmapper.training.task.Task`."""

    def rules(self) -> ModelRules: ...

    def build(self, encoder: Mapping, description: Mapping) -> nn.Module: ...


def load_checkpoint(
    path: str | Path,
    task_named: Callable[[str], Buildable],
    names: Sequence[str] | None,
    device: str | torch.device = "cpu",
    architecture: str | None = None,
) -> nn.Module:
    """A trained model from a checkpoint.

    ``names``: the tasks that a checkpoint may be of, whose rules and builders ``task_named`` gives; None:
    those for which it raises no ``UserError``.

    Otherwise as :func:`clipmapper.tasks.registry.load`, which calls it.
    """
    with _named(path) as file:
        found = read_model(file)
        state = found.state
        task = _checked(found, task_named, names, architecture)
        # Without room for a number: a description may ask for more than there is memory.
        with torch.device("meta"):
            wanted = _empty(task, found.description).state_dict()
        spread_embeddings(found, wanted)
        check_sizes(wanted, state)
        model = _empty(task, found.description)
        model.load_state_dict(state)
    merge_adapters(model.encoder)
    return model.to(device).eval()


def described(
    path: str | Path, task_named: Callable[[str], Buildable], names: Sequence[str] | None
) -> Mapping:
    """What a checkpoint says of its model, checked as :func:`load_checkpoint` does; of its weights only what
    the check takes is read.

    An architecture of one's own may name a tokenizer here: whoever builds the model names the file.
    """
    with _named(path) as file:
        found = read_model(file, whole=False)
        _checked(found, task_named, names, architecture=None, named=True)
        return found.description


def _checked(
    found: ModelFile,
    task_named: Callable[[str], Buildable],
    names: Sequence[str] | None,
    architecture: str | None,
    named: bool = False,
) -> Buildable:
    """The task of a description, behind all checks of what it says."""
    description = found.description
    check_task(description, names)
    task = task_named(description["task"])
    check_description(description, task.rules(), len(found.state), named=named or architecture is not None)
    if architecture is not None:
        _check_architecture(description["encoder"], architecture)
    return task


@contextmanager
def _named(given: str | Path) -> Iterator[Path]:
    """The file that is given; whatever is wrong with it is a ``UserError`` that names it."""
    path = model_path(given)
    if not path.exists():
        known = ", ".join(shipped_models())
        raise UserError(f"checkpoint={given}: no such file, and not a model that is shipped ({known})")
    try:
        yield path
    except Unreadable as error:
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({error})") from error
    except UserError as error:
        raise UserError(f"checkpoint={path}: {error}") from error
    # What a file that was tampered with raises depends on where its numbers do not go together.
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({line})") from error


def _check_architecture(encoder: Mapping, architecture: str) -> None:
    """Raise ``UserError`` where the user names another architecture than the checkpoint has."""
    own = architecture_config(architecture) if architecture.endswith(".json") else None
    if own != encoder["config"] or (own is None and architecture != encoder["architecture"]):
        raise UserError(f"architecture={architecture}: not the one that the model was trained with")


def _empty(task: Buildable, description: Mapping) -> nn.Module:
    """The model of a checked description, without its weights."""
    encoder = dict(description["encoder"])
    config = encoder.pop("config")
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            # open_clip takes a configuration of one's own only from a file, and names it after the file.
            file = Path(folder) / Path(encoder["architecture"]).name
            file.write_text(json.dumps(config))
            encoder["architecture"] = str(file)
        model = task.build(encoder | {"pretrained": None}, description)
        if "preprocess" in encoder:
            visual = model.encoder.clip.visual
            set_model_preprocess_cfg(model.encoder.clip, visual.preprocess_cfg | encoder["preprocess"])
        if config is not None and torch.get_default_device().type != "meta":
            _ = model.encoder.tokenizer  # which is read by the file, while it is there
    model.encoder.architecture = description["encoder"]["architecture"]
    model.description = dict(description)
    return model
