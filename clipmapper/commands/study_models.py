"""The models of a study: named, or trained with each of its seeds where that was not done yet."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from clipmapper.commands.compose import train_settings
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.settings.checks import check_overrides, describe_failure
from clipmapper.settings.compose import config_groups, quoted
from clipmapper.settings.schema import TrainConfig
from clipmapper.settings.study import StudyConfig
from clipmapper.tasks.registry import register_settings
from clipmapper.training.run_folder import CHECKPOINT, RESULTS, finished_run, newest_run, saved_step


@dataclass(frozen=True)
class CellModel:
    """One model of a study: ``model`` trained with ``seed`` by the settings ``given``, or (seed None) the
    checkpoint that ``given`` names. ``folder``: all that the study has of it."""

    model: str
    seed: int | None
    given: str | tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.model if self.seed is None else f"{self.model}/{self.seed}"


def study_models(config: StudyConfig) -> list[CellModel]:
    """All of them, seed by seed, so that every model has been seen once before one is seen again."""
    place, found = Path(config.output) / "cells", []
    for number, seed in enumerate(config.seeds):
        for model, given in config.models.items():
            if isinstance(given, str) and number == 0:
                found.append(CellModel(model, None, given, place / model))
            elif isinstance(given, list):
                found.append(CellModel(model, seed, _completed(config, given), place / model / str(seed)))
    return found


def is_part(config: StudyConfig, cell: CellModel) -> bool:
    """Whether this call is to work the model off. One without a seed goes with the first of the seeds."""
    seed = config.seeds[0] if cell.seed is None else cell.seed
    return config.only_model in (None, cell.model) and config.only_seed in (None, seed)


def _completed(config: StudyConfig, given: list[str]) -> tuple[str, ...]:
    said = {_key(override) for override in given}
    return (*(one for one in config.training if _key(one) not in said), *given)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def run_settings(cell: CellModel) -> TrainConfig:
    """The settings of its training. The name has a digest of them: others are trained in another place.

    Raises ``UserError`` naming the model for settings that are wrong.
    """
    said = f"models.{cell.model}"
    for key in ("seed", "output", "name", "resume"):
        if key in map(_key, cell.given):
            raise UserError(f"{said}: {key} is for the study to say; leave it out of the list")
    register_settings()  # a process of jobs starts without
    groups = config_groups()
    try:
        check_overrides(quoted(cell.given, TrainConfig), TrainConfig, groups, sweep=False)
        config = train_settings(*cell.given, f"seed={cell.seed}", f"output={cell.folder}")
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{said}: {describe_failure(error, TrainConfig, groups)}") from error
    except UserError as error:
        raise UserError(f"{said}: {error}") from error
    if getattr(config.data, "folds", None) is not None and config.data.fold is None:
        raise UserError(f"{said}: data.folds trains several models; give data.fold as well")
    settings = {
        key: value for key, value in asdict(config).items() if key not in ("output", "name", "resume")
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    config.name = f"training_{digest[:10]}"
    return config


def trained(cell: CellModel) -> tuple[Path, Mapping]:
    """The checkpoint of a finished training and its results; trains, or goes on, where there is none.

    Raises what :func:`clipmapper.commands.train.train` does; when interrupted, it says that the same command
    of the study goes on.
    """
    from clipmapper.commands.train import train

    config = run_settings(cell)
    place = Path(config.output, config.name)
    run = finished_run(place)
    if run is None:
        begun = newest_run(place)
        config.resume = False if begun is None else str(begun)
        try:
            run = train(config)
        except RunInterrupted as stop:
            begun = newest_run(place)
            steps = None if begun is None else saved_step(begun)
            of = "nothing of its training is saved" if not steps else f"{steps} steps of it are saved"
            raise RunInterrupted(f"training {cell.name}: {of}") from stop
    results = json.loads((run / RESULTS).read_text())
    # Its own folder may have been moved since; what is kept is in it under the same name.
    return run / CHECKPOINT.parent / Path(results["files"]["checkpoint"]).name, results
