"""The settings of a command from Python, as the command line composes them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import Container
from omegaconf.errors import OmegaConfBaseException

from clipmapper.errors import UserError
from clipmapper.settings.checks import check_overrides, checked, checked_data, describe_failure
from clipmapper.settings.keys import setting_named
from clipmapper.settings.schema import DataConfig, Section, TrainConfig, register
from clipmapper.shipped import shipped_root


def train_settings(*overrides: str) -> TrainConfig:
    """Those of ``clipmapper train``: ``train_settings("data=manifest", "data.path=my.jsonl")``.

    Raises ``UserError`` for settings that are wrong, and Hydra's own exceptions for keys that do not exist.
    """
    return checked(_composed(overrides), TrainConfig)


def data_settings(overrides: Sequence[str]) -> DataConfig:
    """The data set that ``data=… data.KEY=…`` choose, as for ``clipmapper train``.

    Raises ``UserError`` for what is wrong with them, and where none is chosen.
    """
    for override in overrides:
        if override.partition("=")[0].lstrip("+~").partition(".")[0] not in ("data", "experiment"):
            raise UserError(f"{override}: only the data set can be chosen here, as data=… data.KEY=…")
    if not any(override.startswith(("data=", "experiment=")) for override in overrides):
        raise UserError(
            f"{overrides[0]}: of which data set? Choose it as well, as in data=manifest data.path=…"
        )
    groups = config_groups()
    try:
        check_overrides(quoted(overrides, TrainConfig), TrainConfig, groups, sweep=False)
        return checked_data(_composed(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(describe_failure(error, TrainConfig, groups)) from error


def config_groups() -> Mapping[str, Sequence[str]]:
    """The groups of ``clipmapper train`` and their choices; Hydra's own are for Hydra to check."""
    conf = _conf()
    folders = [path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _composed(overrides: Sequence[str]) -> Container:
    register()
    before = GlobalHydra.instance().hydra  # of the command that asks
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(_conf()), version_base="1.3"):
            return compose("train", quoted(overrides, TrainConfig))
    finally:
        GlobalHydra.instance().hydra = before


def _conf() -> Path:
    return (shipped_root() / "conf").absolute()


def quoted(arguments: Sequence[str], schema: type[Section], sweep: bool = False) -> list[str]:
    """Overrides whose free text neither Hydra's grammar nor OmegaConf's takes apart.

    Commas, brackets and quotes stay what they are, and so does ``${…}``: a question that holds
    ``${oc.env:HOME}`` is no request for it. With ``sweep`` a comma separates values, so that only the latter
    is kept.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        setting = setting_named(key.lstrip("+"), schema) if equals else None
        if setting and setting[0].metadata.get("text") and value != "null":
            argument = f"{key}={_literal(value) if sweep else _in_quotes(value)}"
        found.append(argument)
    return found


def _in_quotes(value: str) -> str:
    if re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):  # in quotes already
        return _literal(value)
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (match[2] and r"\'"), _literal(value))
    return f"'{escaped}'"


def _literal(value: str) -> str:
    """Without interpolations: a backslash before ``${``, and those that stand there doubled."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
