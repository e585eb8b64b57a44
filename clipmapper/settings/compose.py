"""The schema and the groups of ``conf/`` for Hydra, and overrides whose free text stays what it is."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from clipmapper.settings import commands, schema, study
from clipmapper.settings.data import DataConfig
from clipmapper.settings.keys import Section, implementations, is_text, setting_named
from clipmapper.shipped import shipped_root

# What else has groups, by its schema: all other groups are those of ``clipmapper train``.
_GROUPS = {study.StudyConfig: ("study",)}


def config_groups(of: type[Section] = schema.TrainConfig) -> Mapping[str, Sequence[str]]:
    """The groups of a command, by its schema, and their choices; Hydra's own are for Hydra to check."""
    others = {name for names in _GROUPS.values() for name in names}
    folders = [
        path
        for path in conf().iterdir()
        if path.is_dir()
        and path.name != "hydra"
        and (path.name not in others if of is schema.TrainConfig else path.name in _GROUPS.get(of, ()))
    ]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def conf() -> Path:
    """The folder of the shipped configurations."""
    return (shipped_root() / "conf").absolute()


@cache
def data_targets() -> Mapping[str, str]:
    """What ``data=`` may be → the ``_target_`` that its shipped configuration builds."""
    found = {}
    for kind in filter(lambda kind: kind.choice, implementations(DataConfig)):
        file = conf() / "data" / f"{kind.choice}.yaml"
        if file.is_file():
            settings = OmegaConf.load(file)
            found[kind.choice] = settings.get("data", settings)._target_
    return found


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
        if setting and is_text(*setting) and value != "null":
            argument = f"{key}={_literal(value) if sweep else _in_quotes(value)}"
        found.append(argument)
    return found


# Settings of which one says what the other would.
_EITHER = (("training.max_steps", "training.max_epochs"), ("training.warmup_steps", "training.warmup_share"))


def completed(arguments: Sequence[str]) -> list[str]:
    """Overrides of ``clipmapper train``, and null for what one that is given stands in place of."""
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    both = [*_EITHER, *((other, one) for one, other in _EITHER)]
    return [*arguments, *(f"{other}=null" for one, other in both if one in given and other not in given)]


def _in_quotes(value: str) -> str:
    if re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):  # in quotes already
        return _literal(value)
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (match[2] and r"\'"), _literal(value))
    return f"'{escaped}'"


def _literal(value: str) -> str:
    """Without interpolations: a backslash before ``${``, and those that stand there doubled."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)


SCHEMAS = {
    "train_schema": schema.TrainConfig,
    "study_schema": study.StudyConfig,
    "explain_schema": commands.ExplainConfig,
    "perturb_schema": commands.PerturbConfig,
    "evaluate_schema": commands.EvaluateConfig,
    "export_schema": commands.ExportConfig,
    "pretrain_clip_schema": commands.PretrainConfig,
    "wandb_logger_schema": schema.WandbLoggerConfig,
    "csv_logger_schema": schema.CSVLoggerConfig,
    "tensorboard_logger_schema": schema.TensorBoardLoggerConfig,
    "mlflow_logger_schema": schema.MLflowLoggerConfig,
    "other_logger_schema": schema.OtherLoggerConfig,
    "no_callbacks_schema": schema.CallbacksConfig,
    "relevance_callback_schema": schema.RelevanceCallbackConfig,
    **{f"{kind.choice}_schema": kind for kind in implementations(DataConfig) if kind.choice},
}


def register(schemas: Mapping[str, type] = SCHEMAS) -> None:
    """Store dataclasses of settings by their names."""
    store = ConfigStore.instance()
    for name, schema_of in schemas.items():
        store.store(name=name, node=schema_of)
