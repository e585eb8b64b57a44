"""Make a composed configuration a checked dataclass, or a line of what is wrong; build what it names."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from clipmapper.errors import UserError
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import (
    Section,
    described,
    is_text,
    name_today,
    nearest_choice,
    section_of,
    setting_named,
    unknown_setting,
)
from clipmapper.settings.schema import TrainConfig

_LONGEST_LIST = 300  # letters of what is allowed in one line
_Schema = TypeVar("_Schema", bound=Section)


def check_overrides(
    overrides: Sequence[str], schema: type[Section], groups: Mapping[str, Sequence[str]], sweep: bool
) -> None:
    """Refuse on the command line what Hydra would let pass, or would answer without naming the setting.

    ``groups``: the config groups and their choices. ``sweep``: several values of a setting are several runs.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        # hydra.KEY and hydra/GROUP are Hydra's own, GROUP@PLACE is for Hydra to judge.
        if not re.match(r"hydra\b", override.key_or_group) and override.package is None:
            _check_override(override, schema, groups, sweep)


def checked(config: Container, schema: type[_Schema]) -> _Schema:
    """The configuration as an instance of its schema. Raises ``UserError`` naming the wrong setting."""
    if OmegaConf.get_type(config) is not schema:
        raise UserError(f"this configuration lacks the schema of {schema.__name__} in its defaults list")
    return _instance(config, "", schema)


def checked_data(config: Container) -> DataConfig:
    """The section ``data`` alone, whatever the task that the others are for; raises as :func:`checked`."""
    return _instance(config.data, "data.", TrainConfig)


def _instance(node: Container, prefix: str, schema: type[Section]) -> Any:
    try:
        _check_keys(node, prefix, schema)
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            given = " ".join(f"{key}=…" for key in missing)
            it = "it" if len(missing) == 1 else "them"
            raise UserError(f"{', '.join(missing)}: no value; give {it} as {given}")
        instance = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(describe_failure(error, schema, {})) from error
    _check_values(instance, prefix)
    return instance


def describe_failure(error: Exception, schema: type[Section], groups: Mapping[str, Sequence[str]]) -> str:
    """One line for an error of Hydra or OmegaConf."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_choice(error.missing_cfg_file, error.options or ())
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return str(error)
    in_file = re.match(r"In '(.+?)': ", str(error))
    where = f"{in_file[1]}.yaml: " if in_file else ""
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return where + unknown_setting(cause.full_key, schema, groups)
    found = setting_named(cause.full_key, schema)
    if isinstance(cause, ValidationError) and found:
        return f"{where}{cause.full_key}: {_as_yaml(cause.value)} is not {described(found[1])}"
    return f"{where}{cause.full_key}: {str(cause).splitlines()[0]}"


def _check_override(
    override: Override, schema: type[Section], groups: Mapping[str, Sequence[str]], sweep: bool
) -> None:
    key, line = override.key_or_group, override.input_line
    if not key:
        raise UserError(_unreadable(line))
    found = setting_named(key, schema)
    if found is None and key not in groups:
        raise UserError(unknown_setting(key, schema, groups))
    if override.is_delete():
        raise UserError(f"{line}: settings cannot be deleted; give {key} another value")
    if override.is_sweep_override():
        if sweep:
            return
        raise UserError(f"{line}: several values; a list is written {key}=[a,b], --multirun runs one by one")
    value = override.value()
    if key in groups:
        if value is None or isinstance(value, int | float):
            raise UserError(_no_such_choice(f"{key}/{_as_yaml(value)}", groups[key]))
    elif section_of(found[1]) and not isinstance(value, dict):
        raise UserError(f"{key}: {_as_yaml(value)} is not a section of settings; give {key}.SETTING=…")
    elif found[1] is bool and isinstance(value, int) and value not in (0, 1):
        # OmegaConf takes any number but 0 for true.
        raise UserError(f"{key}: {value} is not true or false")


def _check_keys(node: Container, prefix: str, schema: type[Section]) -> None:
    """``+section={…}`` adds to a typed node whatever the schema says: refused here."""
    known = {f.name for f in fields(OmegaConf.get_type(node))}
    for key in node:
        if key not in known:
            raise UserError(unknown_setting(f"{prefix}{key}", schema))
        if OmegaConf.is_missing(node, key) or not isinstance(node[key], DictConfig):
            continue
        if is_dataclass(OmegaConf.get_type(node[key])):  # the others are dictionaries of the user's
            _check_keys(node[key], f"{prefix}{key}.", schema)


def _check_values(section: Section, prefix: str) -> None:
    hints = get_type_hints(type(section))
    for declared in fields(section):
        value = getattr(section, declared.name)
        if is_dataclass(value):
            _check_values(value, f"{prefix}{declared.name}.")
            continue
        for entry in value if isinstance(value, list) else [value]:
            limits = {**declared.metadata, "text": is_text(declared, hints[declared.name])}
            problem = None if entry is None else _limit_problem(entry, **limits)
            if problem:
                raise UserError(f"{prefix}{declared.name}: {problem}")
    for key, problem in section.problems():
        raise UserError(f"{prefix}{key}: {problem}")


def _limit_problem(
    value: Any,
    *,
    minimum: int | float | None = None,
    maximum: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    text: bool = False,
) -> str | None:
    if text and isinstance(value, str) and not value.strip():
        return "is empty"
    if text and isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        return "is not UTF-8 text"
    choices = choices() if callable(choices) else choices
    if choices and value not in choices:
        return _not_one_of(value, choices)
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


def _no_such_choice(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    return f"{group}: {_not_one_of(name, options)}" if group else f"there is no configuration {name!r}"


def _not_one_of(value: str, choices: Sequence[str]) -> str:
    near = nearest_choice(value, choices)
    shown = list(choices)
    while len(", ".join(shown)) > _LONGEST_LIST:
        shown.pop()
    more = f" and {len(choices) - len(shown)} more" if len(shown) < len(choices) else ""
    return f"{value!r} is not one of {', '.join(shown)}{more}" + (f"; did you mean {near}?" if near else "")


def _unreadable(override: str | None) -> str:
    return (
        f"cannot read {override!r}: write key=value, or key='\"value\"' for a value with special characters"
    )


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else repr(value)


def built(settings: Mapping):
    """Call what the ``_target_`` of a section stands for with the rest of the section.

    For settings that the user gave on the command line or wrote in YAML, never for what a file says. Values
    are handed over as they are: Hydra would look for ``${…}`` and for more targets in them. Raises
    ``UserError`` for a target that is not there, that Hydra holds dangerous, or that does not take these
    settings.
    """
    try:
        return prepared(settings)()
    except InstantiationException as error:  # of what it gives Hydra may think as of the target
        raise _refused(settings["_target_"], error) from error


def prepared(settings: Mapping) -> Callable[[], Any]:
    """Bind the target of a section to the rest of it, for :func:`built` to call; raises as that."""
    values = dict(settings)
    target = named(values.pop("_target_"))
    try:
        inspect.signature(target).bind(**values)
    except TypeError as error:
        raise UserError(
            f"_target_={settings['_target_']}: cannot be called with these settings ({error})"
        ) from error
    except ValueError:  # of something built in that does not say what it takes
        pass
    return partial(target, **values)


def named(target: str) -> Callable:
    """Return what a ``_target_`` of the user's settings stands for, not called; raises as :func:`built`."""
    try:
        return instantiate({"_target_": name_today(target), "_partial_": True})
    except InstantiationException as error:
        raise _refused(target, error) from error


def _refused(target: str, error: InstantiationException) -> UserError:
    reason = " ".join(str(error).partition(", set env")[0].partition("\nfull_key")[0].split())
    return UserError(f"_target_={target}: {reason}")
