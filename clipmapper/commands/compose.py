"""The settings of a command from Python, as the command line composes them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipmapper.errors import UserError
from clipmapper.settings.checks import check_overrides, checked, checked_data, describe_failure
from clipmapper.settings.compose import completed, conf, config_groups, quoted
from clipmapper.settings.data import DataConfig
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.registry import register_settings, task_named, task_names


def train_settings(*overrides: str) -> TrainConfig:
    """Those of ``clipmapper train``: ``train_settings("data=manifest", "data.path=my.jsonl")``.

    Raises ``UserError`` for settings that are wrong, and Hydra's own exceptions for keys that do not exist.
    """
    return sized_by_init(checked(_composed(overrides), TrainConfig), overrides)


# Of the mapper: weights of another mean something else, or do not fit.
_DECISIVE = ("mapper", "width", "heads", "mlp_ratio")


@contextmanager
def told_of_init() -> Iterator[None]:
    """Inside, what is wrong with a checkpoint is said of ``init``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"init={str(error).removeprefix('checkpoint=')}") from error


def sized_by_init(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The settings with the sizes of the model that ``init`` names, where no override gives them.

    An encoder that is not the default one counts as given. Raises ``UserError`` for a model that cannot be
    read, and for given sizes that its weights contradict.
    """
    if config.init is None:
        return config
    from clipmapper.models.checkpoint import described  # which imports torch

    with told_of_init():
        description = described(config.init, task_named, task_names())
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    model, sizes = config.model, description["model"]
    for key in (field.name for field in fields(model)):
        said = {"model", f"model.{key}"} & given or any(one.startswith(f"model.{key}.") for one in given)
        if key in sizes and not said:
            section = getattr(model, key)
            setattr(model, key, replace(section, **sizes[key]) if is_dataclass(section) else sizes[key])
    for key in _DECISIVE:
        if getattr(model, key) != sizes[key]:
            raise UserError(
                f"model.{key}={getattr(model, key)}: the mapper of init={config.init} has {sizes[key]}; "
                "leave one of the two out"
            )
    _encoder_of_init(config, description["encoder"], given)
    return config


def _encoder_of_init(config: TrainConfig, of_init: Mapping, given: Collection[str]) -> None:
    from clipmapper.models.clip_weights import architecture_config

    encoder, default = config.encoder, OmegaConf.load(conf() / "encoder" / "scenes.yaml")
    own = of_init["config"]

    def is_its(architecture: str) -> bool:
        if own is None or not architecture.endswith(".json"):
            return own is None and architecture == of_init["architecture"]
        return architecture_config(architecture) == own

    chosen = {"encoder", "encoder.architecture", "encoder.pretrained"} & given
    if not chosen and encoder.architecture == default.architecture and not is_its(encoder.architecture):
        if own is not None:
            raise UserError(
                f"init={config.init}: its encoder is {of_init['architecture']}, an architecture of its own; "
                "give the file as encoder.architecture=FILE.json"
            )
        encoder.architecture = of_init["architecture"]
    if not is_its(encoder.architecture):
        return
    if "encoder.image_size" not in given and "image_size" in of_init:
        encoder.image_size = of_init["image_size"]
    if not {"encoder", "encoder.pretrained"} & given:
        encoder.pretrained = None  # init has the weights


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
            return compose("train", completed(quoted(overrides, TrainConfig)))
    finally:
        GlobalHydra.instance().hydra = before
