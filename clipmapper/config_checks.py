"""From a composed configuration to a checked dataclass, and from what went wrong to one line that says it."""

import json
import math
import re
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from clipmapper.config import Section
from clipmapper.errors import UserError

_Schema = TypeVar("_Schema", bound=Section)


def checked(config: DictConfig, schema: type[_Schema]) -> _Schema:
    """The configuration as an instance of its schema. Raises ``UserError`` naming the setting that is wrong."""
    if OmegaConf.get_type(config) is not schema:
        raise UserError(f"this configuration lacks the schema of {schema.__name__} in its defaults list")
    _check_keys(config, schema)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        given = " ".join(f"{key}=…" for key in missing)
        raise UserError(f"{', '.join(missing)}: no value; give {'it' if len(missing) == 1 else 'them'} as {given}")
    instance = OmegaConf.to_object(config)
    _check_values(instance, "")
    return instance


def check_overrides(overrides: Sequence[str], schema: type[Section], groups: Collection[str] = ()) -> None:
    """Refuse what Hydra answers without naming the key: no key at all, a number or null for a whole section."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if not key:
            raise UserError(_unreadable(override.input_line))
        found = setting_named(key, schema)
        if (key in groups or (found and _section_type(found[1]))) and isinstance(value, int | float | None):
            how = f"the name of one of its choices, {key}=NAME" if key in groups else f"given as {key}.SETTING=…"
            raise UserError(f"{key}: {_shown(value)} is not a section of settings; it is {how}")


def describe_failure(error: Exception, schema: type[Section], groups: Collection[str] = ()) -> str:
    """One line for an error of Hydra or OmegaConf. ``groups``: config groups that are no settings themselves."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    where = re.match(r"In '(.+?)': ", str(error))
    file = f"conf/{where[1]}.yaml: " if where and isinstance(cause, OmegaConfBaseException) else ""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_file(error.missing_cfg_file, error.options or ())
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if not_in_defaults := re.match(r"Could not override '(.+?)'\.\s+No match", str(error)):
        return unknown_setting(not_in_defaults[1], schema, groups)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return file + unknown_setting(cause.full_key, schema, groups)
    if isinstance(cause, ValidationError) and cause.full_key:
        found = setting_named(cause.full_key, schema)
        if found:
            return f"{file}{cause.full_key}: {_shown(cause.value)} is not {_described(found[1])}"
    return " ".join(f"{error} {cause or ''}".split())


def unknown_setting(key: str, schema: type[Section], groups: Collection[str] = ()) -> str:
    """One line for a key that does not exist, with the nearest that do."""
    known = {*_keys(schema), *groups}
    if key in known:
        return f"{key}: not a setting of the {key.partition('.')[0]} that is chosen"
    parent, _, last = key.rpartition(".")
    scores: dict[str, float] = {}
    for candidate in known:
        its_parent, _, its_last = candidate.rpartition(".")
        likeness = _likeness(last, its_last)
        if likeness >= 0.6:
            # The right name in another section (batch_size for training.batch_size) is a near miss as well.
            scores[candidate] = likeness + 0.3 * _likeness(parent, its_parent)
    best = sorted(scores, key=lambda candidate: (-scores[candidate], candidate))
    near = [candidate for candidate in best if scores[candidate] > scores[best[0]] - 0.2][:2]
    if near:
        return f"{key}: there is no such setting; did you mean {' or '.join(near)}?"
    siblings = sorted(k for k in known if k.rpartition(".")[0] == (parent if parent in known else ""))
    return f"{key}: there is no such setting; there are {', '.join(siblings)}"


def setting_named(key: str, schema: type[Section]) -> tuple[Field, Any] | None:
    """The field of a dotted key and its type, None when there is none. ``methods[0]`` is an entry of a list."""
    first, _, rest = key.partition(".")
    name, index, _ = first.partition("[")
    for section in (schema, *_subclasses(schema)):
        for candidate in fields(section):
            if candidate.name != name:
                continue
            hint = get_type_hints(section)[name]
            if index and get_origin(hint) is list:
                hint = get_args(hint)[0]
            if not rest:
                return candidate, hint
            nested = _section_type(hint)
            if nested and (found := setting_named(rest, nested)):
                return found
    return None


def _check_keys(node: DictConfig, section: type, prefix: str = "", root: type[Section] | None = None) -> None:
    """`+` adds to a typed node, and `~` takes away from it, whatever the schema says: refused here."""
    root = root or section
    known = [f.name for f in fields(section)]
    present = list(node)
    for key in present:
        if key not in known:
            raise UserError(unknown_setting(f"{prefix}{key}", root))
    for key in known:
        if key not in present:
            raise UserError(f"{prefix}{key}: a setting cannot be deleted; give it another value")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _check_keys(node[key], OmegaConf.get_type(node[key]), f"{prefix}{key}.", root)


def _check_values(section: Section, prefix: str) -> None:
    for declared in fields(section):
        value = getattr(section, declared.name)
        if is_dataclass(value):
            _check_values(value, f"{prefix}{declared.name}.")
            continue
        for entry in value if isinstance(value, list) else [value]:
            problem = None if entry is None else _limit_problem(entry, **declared.metadata)
            if problem:
                raise UserError(f"{prefix}{declared.name}: {problem}")
    for key, problem in section.problems():
        raise UserError(f"{prefix}{key}: {problem}")


def _limit_problem(
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    text: bool = False,
) -> str | None:
    if choices and value not in choices:
        near = max(choices, key=lambda choice: _likeness(value, choice))
        hint = f"; did you mean {near}?" if _likeness(value, near) >= 0.6 else ""
        return f"{value!r} is not one of {', '.join(choices)}{hint}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if minimum is not None and value < minimum:
        return f"{value} is less than {minimum}"
    if maximum is not None and value > maximum:
        return f"{value} is more than {maximum}"
    if above is not None and value <= above:
        return f"{value} is not above {above}"
    if below is not None and value >= below:
        return f"{value} is not below {below}"
    return None


def _unreadable(override: str | None) -> str:
    return f"cannot read {override!r}: write key=value, or key='\"value\"' when the value has special characters"


def _no_such_file(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    if not group:
        return f"there is no configuration {name!r}"
    near = max(options, key=lambda option: _likeness(name, option), default=None)
    hint = f"; did you mean {group}={near}?" if near and _likeness(name, near) >= 0.5 else ""
    return f"{group}: {name!r} is not one of {', '.join(options) or 'its choices (none)'}{hint}"


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All dotted keys, of every implementation of a group."""
    for cls in (section, *_subclasses(section)):
        hints = get_type_hints(cls)
        for declared in fields(cls):
            yield f"{prefix}{declared.name}"
            nested = _section_type(hints[declared.name])
            if nested:
                yield from _keys(nested, f"{prefix}{declared.name}.")


def _subclasses(section: type[Section]) -> list[type[Section]]:
    return [cls for child in section.__subclasses__() for cls in (child, *_subclasses(child))]


def _section_type(hint: Any) -> type[Section] | None:
    for alternative in (hint, *get_args(hint)):
        if isinstance(alternative, type) and issubclass(alternative, Section):
            return alternative
    return None


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_described(alternative) for alternative in get_args(hint))
    if get_origin(hint) is list:
        return "a list, which is written [a,b]"
    if _section_type(hint):
        return "a section of settings"
    names = {int: "an int", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names[hint]


def _shown(value: Any) -> str:
    """As YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
