"""Which data a checkpoint was trained on: told by it, never opened for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import get_type_hints

from torch import nn

from clipmapper.data.records import RecordData
from clipmapper.data.world.data import ScenesCaptions, ScenesVQA
from clipmapper.errors import UserError
from clipmapper.settings.checks import built
from clipmapper.settings.data import DataConfig, ScenesCaptionsConfig, ScenesVQAConfig
from clipmapper.settings.keys import implementations, is_text, name_today
from clipmapper.settings.plain_values import section_of_numbers, shown
from clipmapper.training.task import Task

# The world that is drawn from a seed: to rebuild it takes nothing but numbers.
_WORLDS: Mapping[str, tuple[type[DataConfig], Callable[..., RecordData]]] = {
    "scenes": (ScenesVQAConfig, ScenesVQA),
    "scenes_captions": (ScenesCaptionsConfig, ScenesCaptions),
}
# What older checkpoints have in place of a name, by today's target. They are compared, not imported.
_TARGETS = {
    "clipmapper.data.world.data.ScenesVQA": "scenes",
    "clipmapper.data.world.data.ScenesCaptions": "scenes_captions",
    "clipmapper.data.readers.manifest.manifest_data": "manifest",
    "clipmapper.data.readers.huggingface.huggingface_data": "huggingface",
    "clipmapper.data.readers.vqa_v2.vqa_v2_data": "vqa_v2",
    "clipmapper.data.readers.caption_files.coco_captions_data": "coco_captions",
    "clipmapper.data.readers.caption_files.flickr_captions_data": "flickr30k",
    "clipmapper.data.shards.data.ShardData": "shards",
}
_SHOWN = 4  # settings in a message


def data_description(config: DataConfig) -> dict:
    """Describe the data of a training for its checkpoint: a name and plain settings, for messages.

    ``name`` is what ``data=`` was, or the user's own ``_target_``.
    """
    settings = asdict(config)
    target = settings.pop("_target_")
    name = config.choices[0] if _TARGETS.get(target) in config.choices else target
    return {"name": name, "settings": settings}


def data_for(task: Task, model: nn.Module, given: DataConfig | None, checkpoint: str) -> RecordData:
    """The data to explain a model on: those that the user gives, or the built-in world of its training.

    Raises ``UserError`` where neither is known, and for data of another kind. ``checkpoint``: its path.
    """
    data = _world(model.description.get("data"), checkpoint) if given is None else built(asdict(given))
    task.check_data(data, f"checkpoint={checkpoint}")
    return data


def _world(described: object, checkpoint: str) -> RecordData:
    name, settings = _name_and_settings(described)
    if name not in _WORLDS:
        was = "it does not say which data it was trained on" if name is None else _trained_on(name, settings)
        known = sorted({*_TARGETS.values(), "flickr8k"} - set(_WORLDS))
        choice = name if name in _TARGETS.values() else f"one of {', '.join(known)}"
        raise UserError(
            f"checkpoint={checkpoint}: {was}; a checkpoint opens no data: say which to explain it on, with "
            f"data=… data.KEY=… as for training (data={choice})"
        )
    schema, world = _WORLDS[name]
    try:
        section_of_numbers(schema, leaving=("_target_",))(settings, f"checkpoint={checkpoint}: its data")
    except ValueError as error:
        raise UserError(str(error)) from error
    return world(**settings)


def _name_and_settings(described: object) -> tuple[str | None, object]:
    """Read a description of today's, or an older one with a ``_target_``."""
    if not isinstance(described, Mapping):
        return None, None
    if "_target_" in described:
        target = described["_target_"]
        settings = {key: value for key, value in described.items() if key != "_target_"}
        target = name_today(target)
        return (_TARGETS.get(target, target) if isinstance(target, str) else None), settings
    name = described.get("name")
    return (name if isinstance(name, str) else None), described.get("settings")


def _trained_on(name: str, settings: object) -> str:
    told = list(_told(settings))[:_SHOWN]
    return f"it was trained on data={shown(name)[1:-1]}" + (f" ({', '.join(told)})" if told else "")


def _told(settings: object) -> Iterator[str]:
    """Paths and the like, by which the user will know the data again."""
    texts = {
        one.name
        for schema in implementations(DataConfig)
        for one in fields(schema)
        if is_text(one, get_type_hints(schema)[one.name])
    }
    for key in sorted(texts):
        value = settings.get(key) if isinstance(settings, Mapping) else None
        if isinstance(value, str):
            yield f"{key} {shown(value)}"
