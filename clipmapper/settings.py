"""The settings of a command from Python, as the command line composes them."""

from hydra import compose, initialize_config_dir

from clipmapper.config import TrainConfig, register
from clipmapper.config_checks import checked
from clipmapper.shipped import shipped_root


def train_settings(*overrides: str) -> TrainConfig:
    """Those of ``clipmapper train``: ``train_settings("data=manifest", "data.path=my.jsonl")``.

    Raises ``UserError`` for settings that are wrong, and Hydra's own exceptions for keys that do not exist.
    """
    register()
    with initialize_config_dir(str((shipped_root() / "conf").absolute()), version_base="1.3"):
        return checked(compose("train", list(overrides)), TrainConfig)
