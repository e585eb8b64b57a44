"""The tasks that there are, by name. Only this file names wings.

A task of your own joins by :func:`register` (docs/add_a_task.md): its checkpoints load then, and its settings
can be chosen.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from clipmapper.errors import UserError
from clipmapper.settings.compose import register as register_schemas

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clipmapper.training.task import Task

# They are imported when first asked for: ``clipmapper --help`` need not wait for torch.
_WINGS = ("vqa", "captioning")
_OTHERS: dict[str, "Task"] = {}


def register(task: "Task", schemas: Mapping[str, type] | None = None) -> None:
    """Make a task of your own known. ``schemas``: name in the defaults lists of your YAML → dataclass of
    settings (subclasses of those in :mod:`clipmapper.settings.schema`).

    Raises ``UserError`` for a name that another task has.
    """
    if task.name in _WINGS or _OTHERS.get(task.name, task) is not task:
        raise UserError(f"task={task.name}: there is a task of that name")
    _OTHERS[task.name] = task
    register_schemas(schemas or {})


def register_settings() -> None:
    """Make all settings known to Hydra, those of the tasks among them."""
    register_schemas()
    for name in _WINGS:
        register_schemas(import_module(f"clipmapper.tasks.{name}.settings").SCHEMAS)


def task_names() -> tuple[str, ...]:
    """The names of all tasks."""
    return (*_WINGS, *_OTHERS)


def task_named(name: str) -> "Task":
    """The task of that name. Raises ``UserError`` naming those that there are."""
    if name in _WINGS:
        return import_module(f"clipmapper.tasks.{name}.task").TASK
    if name not in _OTHERS:
        raise UserError(f"task={name}: not one of {', '.join(task_names())}")
    return _OTHERS[name]


def task_of(model: "nn.Module") -> "Task":
    """The task of a model. Raises ``UserError`` for one that is none of ours."""
    name = getattr(model, "task", None)
    if not isinstance(name, str):
        raise UserError(
            f"{type(model).__name__} is no model of clipmapper; clipmapper.relevance explains any model"
        )
    return task_named(name)


def load(
    path: str | Path, device: "str | torch.device" = "cpu", architecture: str | None = None
) -> "nn.Module":
    """A trained model from a checkpoint, ready to ``.answer(image, question)`` or to ``.caption(image)``.

    The file may be anybody's: no pickled code is executed, every byte is compared with its checksum, and what
    it says of the model is checked against a closed list (:mod:`clipmapper.models.description`) and against
    its own weights before anything is built. Nothing else is opened; of open_clip's own architectures some
    (SigLIP) have a tokenizer that is fetched when a text is first read. ``architecture``: for a model whose
    architecture is your own file and names a tokenizer, that file.

    Raises ``UserError`` when the file is missing, damaged, not a checkpoint of a CLIPmapper, or has weights
    that are not finite.
    """
    from clipmapper.models.checkpoint import load_checkpoint

    return load_checkpoint(path, task_named, task_names(), device, architecture)
