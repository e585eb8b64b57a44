"""What a run logs to, Weights & Biases or CSV, complete before the run says where it is."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from clipmapper.config import LoggerConfig
from clipmapper.training.run_folder import RESULTS


@contextmanager
def run_logger(settings: LoggerConfig, folder: Path, name: str) -> Iterator[WandbLogger | CSVLogger]:
    """The logger of a run in ``folder``; however the block ends, what was logged is on disk behind it."""
    options = asdict(settings)
    if not options.pop("_target_").endswith("WandbLogger"):
        yield CSVLogger(save_dir=folder, name="csv", **options)
        return
    run = wandb.init(
        **options,
        # Absolute: the file of the run is written by a process that may have another working directory (that
        # of the program which started W&B's service first, as `wandb agent` does for the runs it starts).
        dir=os.path.abspath(folder),
        name=name,
        reinit="create_new",  # a run of the calling program, should there be one, is left alone
        # Offline runs stay silent: wandb's own lines about syncing would stand between our tables, the last
        # of which has the folder. Online, wandb says where the run is.
        settings=wandb.Settings(silent=options["mode"] == "offline"),
    )
    try:
        yield WandbLogger(experiment=run)
    except BaseException:
        _finish(run, exit_code=1)
        raise
    _finish(run, exit_code=0)


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
