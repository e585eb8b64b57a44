"""Sections of settings, and settings by their key: found, the nearest to one that is none, older names.

Names that older runs and checkpoints have are compared, never imported: only today's names lead anywhere.
"""

import re
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import Field, field, fields
from difflib import SequenceMatcher
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

SEED_LIMIT = 2**32 - 1  # numpy's legacy generator, which Lightning seeds as well, takes no more
# Of explanations: what each is, clipmapper.evaluation.explanation_scores.chosen says.
EXPLANATION_SCORES = (
    "removal",
    "replace_mean",
    "replace_other",
    "replace_blur",
    "replace_grey",
    "replace_background",
    "oracle",
    "f_syn",
    "adcc",
    "infidelity",
    "sensitivity",
    "sanity",
)
# How words' maps become a caption's.
WORD_MAPS = ("scaled", "raw", "root", "largest", "coverage")


def explanation_methods() -> Sequence[str]:
    """The names of the explanation methods, looked up when one is to be checked: they import torch."""
    from clipmapper.relevance import ALSO_CALLED, METHODS

    return (*METHODS, *ALSO_CALLED)


def explained_scalars() -> Sequence[str]:
    """What can be explained of an answer or a word, likewise."""
    from clipmapper.relevance.explained_scalar import EXPLAINED

    return EXPLAINED


def setting(**limits: Any) -> Any:
    """A field whose value comes from YAML or the command line.

    ``limits``: ``minimum``, ``maximum`` (allowed themselves), ``above``, ``below`` (not allowed themselves);
    ``choices`` of a string or of a list's entries, or a function that gives them. Choices are strings rather
    than an ``Enum`` because they end up in JSON, in W&B and in checkpoints that are loaded without unpickling
    classes. ``text``: free text (:func:`is_text`) though the type does not say so.
    """
    return field(default=MISSING, metadata=limits)


class Section:
    """A group of settings."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it), for rules that one setting's limits cannot say."""
        yield from ()


def list_problems(key: str, values: list) -> Iterator[tuple[str, str]]:
    """Problems of a list that is empty or has something twice."""
    if not values:
        yield key, "is an empty list"
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        yield key, f"{twice[0]!r} is listed twice"


def devices_problems(devices: str) -> Iterator[tuple[str, str]]:
    """Problems of a number of devices, or a list of them, for Lightning."""
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+", devices):
        yield "devices", f"{devices!r} is not a number of devices (1, 2 …), a list as '0,1', or auto"


def is_text(declared: Field, hint: Any) -> bool:
    """Whether a setting is free text: a string that is none of some choices. It is not empty, and taken from
    the command line as it is, without Hydra's grammar (commas, brackets, ``=``)."""
    if declared.metadata.get("text"):
        return True
    return hint in (str, str | None) and not declared.metadata.get("choices")


def setting_named(key: str, schema: type[Section]) -> tuple[Field, Any] | None:
    """The field of a dotted key and its type, None when there is none. ``methods[0]`` is an entry of a list.

    Where a group has several implementations, the settings of all of them count.
    """
    first, _, rest = key.partition(".")
    name, index, _ = first.partition("[")
    for section in implementations(schema):
        declared = {f.name: f for f in fields(section)}.get(name)
        if declared is None:
            continue
        hint = get_type_hints(section)[name]
        if not rest:
            return declared, get_args(hint)[0] if index else hint
        if get_origin(hint) is dict:  # whose keys are the user's own
            return declared, get_args(hint)[1]
        nested = section_of(hint)
        if nested and (found := setting_named(rest, nested)):
            return found
    return None


def section_of(hint: Any) -> type[Section] | None:
    """The section that a type or an optional type stands for."""
    for alternative in (hint, *get_args(hint)):
        if isinstance(alternative, type) and issubclass(alternative, Section):
            return alternative
    return None


def unknown_setting(key: str, schema: type[Section], groups: Collection[str] = ()) -> str:
    """One line for a key that does not exist, with the nearest that do. ``groups``: those of ``conf/``."""
    if key.startswith("hydra."):
        return f"{key}: Hydra has no such setting"
    known = {*_keys(schema), *groups}
    if key in known:
        return f"{key}: not a setting of the {key.partition('.')[0]} that is chosen"
    if setting_named(key, schema):  # in a dictionary of the user's, which Hydra adds to with a plus alone
        return f"{key}: a new entry; give it as +{key}=…"
    near = _nearest(key, known)
    if near:
        return f"{key}: there is no such setting; did you mean {' or '.join(near)}?"
    parent = key.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == parent] or [k for k in known if "." not in k]
    return f"{key}: there is no such setting; there are {', '.join(sorted(beside))}"


def nearest_choice(value: str, choices: Collection[str]) -> str | None:
    """The choice that was probably meant."""
    best = max(choices, key=lambda choice: _likeness(value, choice), default="")
    return best if best and _likeness(value, best) >= 0.6 else None


def described(hint: Any) -> str:
    """Say in words what a value of this type is."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(described(alternative) for alternative in get_args(hint))
    if get_origin(hint) is list:
        return "a list, which is written [a,b]"
    if get_origin(hint) is dict:
        return "a dictionary, which is written {key: value}"
    if section_of(hint):
        return "a section of settings"
    names = {int: "an int", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names[hint]


def _nearest(key: str, known: Collection[str]) -> list[str]:
    parent, _, last = key.rpartition(".")
    scores = {}
    for candidate in known:
        its_parent, _, its_last = candidate.rpartition(".")
        likeness = _likeness(last, its_last)
        if likeness >= 0.6:
            # The right name in another section (batch_size for training.batch_size) is a near miss as well.
            scores[candidate] = likeness + 0.3 * _likeness(parent, its_parent)
    best = sorted(scores, key=lambda candidate: (-scores[candidate], candidate))
    return [candidate for candidate in best if scores[candidate] > scores[best[0]] - 0.2][:2]


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    for section in implementations(schema):
        hints = get_type_hints(section)
        for declared in fields(section):
            yield f"{prefix}{declared.name}"
            nested = section_of(hints[declared.name])
            if nested:
                yield from _keys(nested, f"{prefix}{declared.name}.")


_Schema = TypeVar("_Schema", bound=Section)


def implementations(schema: type[_Schema]) -> list[type[_Schema]]:
    """A schema and all that are made from it."""
    return [schema, *(each for child in schema.__subclasses__() for each in implementations(child))]


# Settings that there are no more; their section says as much.
GONE = frozenset({"training._target_"})

_Value = TypeVar("_Value")

# Every ``_target_`` that was ever in ``conf/`` and is no more.
_TARGETS = {
    "clipmapper.data.scenes_vqa.ScenesVQA": "clipmapper.data.world.data.ScenesVQA",
    "clipmapper.data.scenes_captions.ScenesCaptions": "clipmapper.data.world.data.ScenesCaptions",
    "clipmapper.data.manifest.manifest_data": "clipmapper.data.readers.manifest.manifest_data",
    "clipmapper.data.huggingface.huggingface_data": "clipmapper.data.readers.huggingface.huggingface_data",
    "clipmapper.data.vqa_v2.vqa_v2_data": "clipmapper.data.readers.vqa_v2.vqa_v2_data",
    "clipmapper.data.coco_captions.coco_captions_data": (
        "clipmapper.data.readers.caption_files.coco_captions_data"
    ),
    "clipmapper.data.flickr_captions.flickr_captions_data": (
        "clipmapper.data.readers.caption_files.flickr_captions_data"
    ),
    "clipmapper.data.shard_data.ShardData": "clipmapper.data.shards.data.ShardData",
    "clipmapper.training.relevance_callback.RelevanceCallback": (
        "clipmapper.training.callback.RelevanceCallback"
    ),
}


def name_today(value: _Value) -> _Value | str:
    """Today's name of a ``_target_``; anything else is given back as it is."""
    return _TARGETS.get(value, value) if isinstance(value, str) else value
