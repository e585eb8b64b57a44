"""Weights & Biases, all that is for it alone: a run, complete before its folder is named, and media."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from clipmapper.errors import UserError
from clipmapper.host import outputs
from clipmapper.training.run_folder import RESULTS
from clipmapper.training.shown import Cell, Html, Media, MediaTable, Picture

_INSTEAD = "logger.mode=offline needs neither: `wandb sync` uploads the run later"


def check_wandb(options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for options that ``wandb.init`` does not take, and where W&B is to be used online
    without a key, or does not answer."""
    try:
        inspect.signature(wandb.init).bind(**options)
    except TypeError as error:
        raise UserError(f"logger: wandb.init cannot be called with these settings ({error})") from error
    if options.get("mode") != "online":
        return
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        address = wandb.setup().settings.base_url
        key = os.environ.get("WANDB_API_KEY") or wandb.Api(timeout=int(outputs.PATIENCE)).api_key
    except wandb.Error:
        key = None
    except ValueError as error:  # pydantic's, of what the environment or a settings file says
        what = " ".join(str(error).split("\n    For further")[0].split())
        raise UserError(f"logger.mode=online: W&B's settings can't be used ({what}). {_INSTEAD}") from error
    if not key:
        what = f"no API key for {address}; give one by `wandb login`"
        raise UserError(f"logger.mode=online: {what}. {_INSTEAD}")
    outputs.check_answer(address, "logger.mode=online", _INSTEAD)


@contextmanager
def wandb_logger(
    target: Callable[..., WandbLogger], options: Mapping[str, Any], folder: Path, name: str
) -> Iterator[WandbLogger]:
    """The logger of a run in ``folder``; however the block ends, what was logged is on disk behind it."""
    options = {"mode": "offline", **options}
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
        yield target(experiment=run)
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


def wandb_files(logger: WandbLogger, folder: Path) -> dict[str, Path]:
    """The run's own folder. Warns of an offline run without its file; there is nothing to name then."""
    directory = folder / Path(logger.experiment.dir).parent.relative_to(os.path.abspath(folder))
    if logger.experiment.offline and not any(directory.glob("run-*.wandb")):
        warnings.warn(
            f"W&B has not written its offline run: there is no run-*.wandb in {directory}. "
            f"The results are in {folder / RESULTS} all the same.",
            stacklevel=3,
        )
        return {}
    return {"W&B run": directory}


def media_to_wandb(logger: WandbLogger, media: Media, step: int) -> None:
    """All of it as one row of W&B's history."""
    shown = {name: _as_wandb(one) for name, one in media.items()}
    logger.experiment.log({**shown, "trainer/global_step": step})


def _as_wandb(shown: Cell | MediaTable) -> object:
    if isinstance(shown, Picture):
        return wandb.Image(str(shown.source) if isinstance(shown.source, Path) else shown.source)
    if isinstance(shown, Html):
        return wandb.Html(shown.code)
    if isinstance(shown, MediaTable):
        table = wandb.Table(columns=list(shown.columns))
        for row in shown.rows:
            table.add_data(*(_as_wandb(row[column]) for column in shown.columns))
        return table
    return shown


def _finish(run: wandb.Run, exit_code: int) -> None:
    """End the run and wait for its file. What goes wrong here is no reason to lose a training's results."""
    try:
        run.finish(exit_code)
        # The service only begins to close the file when finish returns: until it has ended, the last records
        # may be missing. It is needed no more, unless the calling program has a run of its own.
        if wandb.run is None:
            wandb.teardown()
    except (Exception, SystemExit) as error:  # teardown exits where the service has ended with an error
        warnings.warn(f"W&B: the run could not be finished: {error!r}", stacklevel=4)
