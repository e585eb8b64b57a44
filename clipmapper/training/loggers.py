"""What a run logs to, Weights & Biases or CSV, complete before the run says where it is."""

import http.client
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from clipmapper.errors import UserError
from clipmapper.settings.schema import LoggerConfig
from clipmapper.training.run_folder import RESULTS

_PATIENCE = 10.0  # seconds for W&B's server to answer, before anything else is done
_INSTEAD = "logger.mode=offline needs neither: `wandb sync` uploads the run later"


def check_logger(settings: LoggerConfig) -> None:
    """Raise ``UserError`` where W&B is to be used online without a key, or does not answer.

    To be called before data are read.
    """
    options = asdict(settings)
    if options.get("mode") != "online":
        return
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        address = wandb.setup().settings.base_url
        key = os.environ.get("WANDB_API_KEY") or wandb.Api(timeout=int(_PATIENCE)).api_key
    except wandb.Error:
        key = None
    except ValueError as error:  # pydantic's, of what the environment or a settings file says
        what = " ".join(str(error).split("\n    For further")[0].split())
        raise UserError(f"logger.mode=online: W&B's settings can't be used ({what}). {_INSTEAD}") from error
    if not key:
        what = f"no API key for {address}; give one by `wandb login`"
        raise UserError(f"logger.mode=online: {what}. {_INSTEAD}")
    try:
        with urllib.request.urlopen(address, timeout=_PATIENCE):
            pass
    except urllib.error.HTTPError:  # an answer all the same
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(
            f"logger.mode=online: no answer from {address} within {_PATIENCE:.0f} s ({reason}). {_INSTEAD}"
        ) from error


@contextmanager
def run_logger(settings: LoggerConfig, folder: Path, name: str) -> Iterator[WandbLogger | CSVLogger]:
    """The logger of a run in ``folder``; however the block ends, what was logged is on disk behind it."""
    options = asdict(settings)
    if not options.pop("_target_").endswith("WandbLogger"):
        yield CSVLogger(save_dir=folder, name="csv", **options)
        return
    run = _started(
        **options,
        # Absolute: the file of the run is written by a process that may have another working directory (that
        # of the program which started W&B's service first, as `wandb agent` does for the runs it starts).
        dir=os.path.abspath(folder),
        name=name,
        reinit="create_new",  # a run of the calling program, should there be one, is left alone
        # Offline runs stay silent: wandb's own lines about syncing would stand between our tables, the last
        # of which has the folder. Online, wandb says where the run is.
        settings=wandb.Settings(silent=options["mode"] == "offline", init_timeout=60),
    )
    try:
        yield WandbLogger(experiment=run)
    except BaseException:
        _finish(run, exit_code=1)
        raise
    _finish(run, exit_code=0)


def _started(mode: str, **options) -> wandb.Run:
    try:
        return wandb.init(mode=mode, **options)
    # A key that is not known or no key at all, a server that stopped answering.
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split())[:200].replace(
            "<no message>", "it gave no reason; is the key right?"
        )
        raise UserError(f"logger.mode={mode}: W&B did not start the run ({reason}). {_INSTEAD}") from error


def logged_files(logger: WandbLogger | CSVLogger, folder: Path) -> dict[str, Path]:
    """What the logger of a finished run has left in ``folder``, by what it is called in the results.

    Warns of an offline run without its file; there is nothing to name then.
    """
    if isinstance(logger, CSVLogger):
        return {"metrics": Path(logger.log_dir) / "metrics.csv"}
    directory = folder / Path(logger.experiment.dir).parent.relative_to(os.path.abspath(folder))
    if logger.experiment.offline and not any(directory.glob("run-*.wandb")):
        warnings.warn(
            f"W&B has not written its offline run: there is no run-*.wandb in {directory}. "
            f"The results are in {folder / RESULTS} all the same.",
            stacklevel=2,
        )
        return {}
    return {"W&B run": directory}


def _finish(run: wandb.Run, exit_code: int) -> None:
    """End the run and wait for its file. What goes wrong here is no reason to lose a training's results."""
    try:
        run.finish(exit_code)
        # The service only begins to close the file when finish returns: until it has ended, the last records
        # may be missing. It is needed no more, unless the calling program has a run of its own.
        if wandb.run is None:
            wandb.teardown()
    except (Exception, SystemExit) as error:  # teardown exits where the service has ended with an error
        warnings.warn(f"W&B: the run could not be finished: {error!r}", stacklevel=3)


@dataclass(frozen=True)
class Picture:
    """A picture in a table: a file, or UInt8[height, width, 3]."""

    source: Path | np.ndarray


@dataclass(frozen=True)
class Html:
    """A text with colours in a table."""

    text: str


def log_table(loggers: Sequence[Logger], name: str, rows: Sequence[Mapping], step: int) -> None:
    """Rows (column → number, text, :class:`Picture` or :class:`Html`) to the loggers that take tables."""
    for logger in loggers:
        if rows and isinstance(logger, WandbLogger):
            table = wandb.Table(columns=list(rows[0]))
            for row in rows:
                table.add_data(*map(_as_media, row.values()))
            logger.experiment.log({name: table, "trainer/global_step": step})


def log_pictures(loggers: Sequence[Logger], pictures: Mapping[str, Path], step: int) -> None:
    """Pictures to the loggers that take some."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            found = {name: wandb.Image(str(path)) for name, path in pictures.items()}
            logger.experiment.log(found | {"trainer/global_step": step})


def _as_media(value: object) -> object:
    if isinstance(value, Html):
        return wandb.Html(value.text)
    if isinstance(value, Picture):
        return wandb.Image(str(value.source) if isinstance(value.source, Path) else value.source)
    return value
