"""Which data a checkpoint was trained on: told by it, never opened for it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import get_type_hints

from torch import nn

from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.settings.checks import built
from clipmapper.settings.compose import data_targets
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import implementations, is_text, name_today
from clipmapper.settings.plain_values import section_of_numbers, shown
from clipmapper.training.task import Task

_SHOWN = 4  # settings in a message


def data_description(config: DataConfig) -> dict:
    """Describe the data of a training for its checkpoint: a name and plain settings, for messages.

    ``name`` is what ``data=`` was, or the user's own ``_target_``.
    """
    settings = asdict(config)
    target = settings.pop("_target_")
    del settings["augment"]  # which is of the training, not of the data
    shipped = data_targets().get(config.choice) == target
    return {"name": config.choice if shipped else target, "settings": settings}


def data_for(task: Task, model: nn.Module, given: DataConfig | None, checkpoint: str) -> RecordData:
    """The data to explain a model on: those that the user gives, or the built-in world of its training.

    Raises ``UserError`` where neither is known, and for data of another kind. ``checkpoint``: its path.
    """
    data = _world(model.description.get("data"), checkpoint) if given is None else built(asdict(given))
    task.check_data(data, f"checkpoint={checkpoint}")
    return data


def _world(described: object, checkpoint: str) -> RecordData:
    name, settings = _name_and_settings(described)
    # The world that is drawn from a seed: to rebuild it takes nothing but numbers.
    worlds = {kind.choice: kind for kind in implementations(DataConfig) if kind.world}
    if name not in worlds:
        was = "it does not say which data it was trained on" if name is None else _trained_on(name, settings)
        known = sorted(data_targets().keys() - worlds.keys())
        choice = name if name in known else f"one of {', '.join(known)}"
        raise UserError(
            f"checkpoint={checkpoint}: {was}; a checkpoint opens no data: say which to use, with "
            f"data=… data.KEY=… as for training (data={choice})"
        )
    try:
        check = section_of_numbers(worlds[name], leaving=("_target_", "augment"))
        check(settings, f"checkpoint={checkpoint}: its data")
    except ValueError as error:
        raise UserError(str(error)) from error
    return built({"_target_": data_targets()[name], **settings})


def _name_and_settings(described: object) -> tuple[str | None, object]:
    """Read a description of today's, or an older one with a ``_target_``."""
    if not isinstance(described, Mapping):
        return None, None
    if "_target_" in described:
        target = described["_target_"]
        settings = {key: value for key, value in described.items() if key != "_target_"}
        target = name_today(target)
        known = (name for name, its in data_targets().items() if its == target)  # compared, not imported
        return (next(known, target) if isinstance(target, str) else None), settings
    name = described.get("name")
    return (name if isinstance(name, str) else None), described.get("settings")


def _trained_on(name: str, settings: object) -> str:
    told = list(_told(settings))[:_SHOWN]
    return f"it was trained on data={shown(name)[1:-1]}" + (f" ({', '.join(told)})" if told else "")


def without_texts(described: Mapping) -> dict:
    """A description of data (:func:`data_description`) to give away: without paths and other free text."""
    texts = _texts()
    settings = {key: value for key, value in described["settings"].items() if key not in texts}
    return {**described, "settings": settings}


def _texts() -> set[str]:
    """The settings of data that are free text."""
    return {
        one.name
        for schema in implementations(DataConfig)
        for one in fields(schema)
        if is_text(one, get_type_hints(schema)[one.name])
    }


def _told(settings: object) -> Iterator[str]:
    """Paths and the like, by which the user will know the data again."""
    for key in sorted(_texts()):
        value = settings.get(key) if isinstance(settings, Mapping) else None
        if isinstance(value, str):
            yield f"{key} {shown(value)}"
