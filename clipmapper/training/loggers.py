"""The logger of a run: the Lightning logger that the settings name, and never another one.

Numbers go there by Lightning's own ``log_metrics``. Pictures and tables go through :func:`log_media`, to the
loggers that take them; with the others they stay in the run's folder.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from clipmapper.errors import UserError
from clipmapper.host.outputs import check_answer
from clipmapper.settings.checks import named, prepared
from clipmapper.settings.schema import LoggerConfig
from clipmapper.training.mlflow_runs import media_to_mlflow
from clipmapper.training.shown import Html, Media, MediaTable, Picture, pictures_in
from clipmapper.training.wandb_runs import check_wandb, media_to_wandb, wandb_files, wandb_logger


def check_logger(settings: LoggerConfig) -> None:
    """Raise ``UserError`` for a logger that can't be used: none of Lightning's kind, a package that is
    missing, settings that it does not take, a server that does not answer.

    To be called before data are read.
    """
    try:
        target = named(settings._target_).func
    except UserError as error:
        raise UserError(f"logger.{error}") from error
    if isinstance(target, type) and not issubclass(target, Logger):
        raise _no_logger(settings)
    _known(target).check(settings)


def run_logger(settings: LoggerConfig, folder: Path, name: str) -> AbstractContextManager[Logger]:
    """The logger of a run in ``folder``; however the block ends, what was logged is on disk behind it."""
    return _known(named(settings._target_).func).running(settings, folder, name)


def logged_files(logger: Logger, folder: Path) -> dict[str, Path]:
    """Find the files that the logger of a finished run has left, by what they are called in the results.

    Warns where one that writes to the run's folder has left nothing; there is nothing to name then.
    """
    return _known(type(logger)).files(logger, folder)


def log_media(loggers: Sequence[Logger], media: Callable[[], Media], *, step: int) -> None:
    """Give pictures and tables to the loggers that take them; they are made where there is one."""
    takers = [(logger, known.media) for logger in loggers if (known := _known(type(logger))).media]
    made = media() if takers else {}
    for logger, take in takers:
        take(logger, made, step)


def _media_to_tensorboard(logger: TensorBoardLogger, media: Media, step: int) -> None:
    """Pictures, and of a table its words and numbers too, as Markdown."""
    for name, picture in pictures_in(media):
        logger.experiment.add_image(name, picture.pixels(), step, dataformats="HWC")
    for name, table in media.items():
        if isinstance(table, MediaTable) and table.rows:
            columns = [c for c in table.columns if not isinstance(table.rows[0][c], Picture | Html)]
            lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in table.rows)]
            cells = ([" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines)
            logger.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)


@dataclass(frozen=True)
class _Known:
    """Facts about a logger: where in the run's folder it writes and what the results call that, which
    of several packages it needs and the extra of pip that has it, what the run gives it besides, which of
    its settings is a server's address, and what shows it pictures and tables."""

    folder: str
    named: str
    packages: Sequence[str] = ()
    extra: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    server: str = ""
    media: Callable[[Any, Media, int], None] | None = None

    def check(self, settings: LoggerConfig) -> None:
        """See :func:`check_logger`."""
        if self.packages and not any(map(importlib.util.find_spec, self.packages)):
            raise UserError(
                f"logger._target_={settings._target_}: needs {self.packages[0]}: "
                f"pip install 'clipmapper[{self.extra}]'"
            )
        self._prepared(settings, Path(), "")
        server = str(_options(settings).get(self.server))
        if server.startswith(("http://", "https://")):
            check_answer(server, f"logger.{self.server}", "null writes to the run's folder")

    @contextmanager
    def running(self, settings: LoggerConfig, folder: Path, name: str) -> Iterator[Logger]:
        """See :func:`run_logger`."""
        try:
            logger = self._prepared(settings, folder, name)()
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"logger._target_={settings._target_}: {reason}") from error
        except Exception as error:  # of another's code: a key that is missing, a server that is away
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"logger._target_={settings._target_}: it did not start ({reason})") from error
        if not isinstance(logger, Logger):
            raise _no_logger(settings)
        try:
            yield logger
        except BaseException:
            _finish(logger, "failed")
            raise
        _finish(logger, "success")

    def files(self, logger: Logger, folder: Path) -> dict[str, Path]:
        """See :func:`logged_files`."""
        where = logger.log_dir or logger.save_dir
        if where is None:  # it is on a server
            return {}
        left = Path(where) / self.file
        if left.is_file() or (left.is_dir() and any(left.iterdir())):
            return {self.named: left}
        if self is not _OTHER:
            warnings.warn(f"{type(logger).__name__} has not written {left}.", stacklevel=3)
        return {}

    def _prepared(self, settings: LoggerConfig, folder: Path, name: str) -> Callable[[], Logger]:
        """The logger, to be called, with those of folder and name that it takes and the user leaves."""
        given = {**dict.fromkeys(_FOLDERS, folder / self.folder), "run_name": name, **self.given}
        try:
            takes = inspect.signature(named(settings._target_).func).parameters
        except ValueError:  # of something built in that does not say what it takes
            takes = {}
        given = {key: value for key, value in given.items() if key in takes}
        return prepared({"_target_": settings._target_, **given, **_options(settings)})


class _KnownWandb(_Known):
    def check(self, settings: LoggerConfig) -> None:
        check_wandb(_options(settings))

    def running(self, settings: LoggerConfig, folder: Path, name: str) -> AbstractContextManager[WandbLogger]:
        return wandb_logger(named(settings._target_).func, _options(settings), folder, name)

    files = staticmethod(wandb_files)


_KNOWN: dict[type[Logger], _Known] = {
    CSVLogger: _Known("csv", "metrics", given={"name": ""}, file="metrics.csv"),
    TensorBoardLogger: _Known(
        "tensorboard",
        "TensorBoard",
        ("tensorboard", "tensorboardX"),
        "tensorboard",
        {"name": ""},
        media=_media_to_tensorboard,
    ),
    MLFlowLogger: _Known(
        "mlflow", "MLflow", ("mlflow",), "mlflow", server="tracking_uri", media=media_to_mlflow
    ),
    WandbLogger: _KnownWandb("wandb", "W&B run", media=media_to_wandb),
}
_OTHER = _Known("logs", "logs")
# What loggers of Lightning call the folder that they write to.
_FOLDERS = ("save_dir", "root_dir", "offline_directory")


def _known(target: Callable) -> _Known:
    kinds = target.__mro__ if isinstance(target, type) else ()
    return next((_KNOWN[kind] for kind in kinds if kind in _KNOWN), _OTHER)


def _options(settings: LoggerConfig) -> dict[str, Any]:
    """What the settings give the logger."""
    options = asdict(settings)
    del options["_target_"]
    return options | options.pop("options", {})


def _no_logger(settings: LoggerConfig) -> UserError:
    return UserError(f"logger._target_={settings._target_}: not a subclass of Lightning's Logger")


def _finish(logger: Logger, status: str) -> None:
    """Write what is left. What goes wrong here is no reason to lose a training's results."""
    try:
        logger.finalize(status)
    except Exception as error:
        warnings.warn(f"{type(logger).__name__} could not be finished: {error!r}", stacklevel=3)
