"""The settings of a command from Python, as the command line composes them."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import Container
from omegaconf.errors import OmegaConfBaseException

from clipmapper.errors import UserError
from clipmapper.settings.checks import check_overrides, checked, checked_data, describe_failure
from clipmapper.settings.compose import conf, config_groups, quoted
from clipmapper.settings.data import DataConfig
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.registry import register_settings


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


def _composed(overrides: Sequence[str]) -> Container:
    register_settings()
    before = GlobalHydra.instance().hydra  # of the command that asks
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(conf()), version_base="1.3"):
            return compose("train", quoted(overrides, TrainConfig))
    finally:
        GlobalHydra.instance().hydra = before
