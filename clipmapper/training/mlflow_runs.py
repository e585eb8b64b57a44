"""MLflow: Lightning's logger with a database in the run's folder, names that MLflow takes, and pictures."""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from clipmapper.errors import UserError
from clipmapper.training.shown import Html, Media, MediaTable, Picture, pictures_in

_AT_ONCE = 1000  # metrics, the most that MLflow takes in one call
_LONGEST = 250  # letters of a metric's name


class MLflowRun(MLFlowLogger):
    """A run of ``experiment_name``, at the server of ``tracking_uri``, or without one in ``save_dir``.

    A database there rather than files: MLflow's store in files is no longer developed and has to be allowed,
    and it has no place for ``a`` and ``a/b`` both. ``mlflow ui --backend-store-uri sqlite:///…/mlflow.db``
    shows it. Raises ``UserError`` where MLflow does not begin the run.
    """

    def __init__(self, experiment_name: str, tracking_uri: str | None, save_dir: Path, run_name: str) -> None:
        self._folder = None if tracking_uri else Path(save_dir).absolute()
        artifacts = None
        if self._folder:
            # Of an address of a database: where it ends, and what releases of SQLAlchemy read differently.
            if odd := {"?", "%"} & set(str(self._folder)):
                raise UserError(f"logger=mlflow: its database can't be in {self._folder} ({min(odd)!r})")
            self._folder.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{self._folder / 'mlflow.db'}"
            artifacts = (self._folder / "artifacts").as_uri()
        try:
            with _quiet():
                super().__init__(experiment_name, run_name, tracking_uri, artifact_location=artifacts)
                _ = self.experiment
        except ImportError:
            raise
        except Exception as error:  # MLflow's own, of its database, of the network
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"logger=mlflow: MLflow did not begin the run ({reason})") from error

    @property
    def log_dir(self) -> str | None:
        """Where database and artifacts are, if not on a server."""
        return None if self._folder is None else str(self._folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers under the names that they have elsewhere, as far as MLflow takes them."""
        named = [(_allowed(name), value) for name, value in metrics.items()]
        for first in range(0, len(named), _AT_ONCE):
            super().log_metrics(dict(named[first : first + _AT_ONCE]), step)


def media_to_mlflow(logger: MLFlowLogger, media: Media, step: int) -> None:
    """Artifacts ``name/step_000006/…``: pictures, HTML, and tables as JSON that names both."""
    client, run = logger.experiment, logger.run_id
    for name, picture in pictures_in(media):
        client.log_image(run, Image.fromarray(picture.pixels()), artifact_file=_file(name, step, "png"))
    for name, table in media.items():
        if not isinstance(table, MediaTable):
            continue
        rows = []
        for number, row in enumerate(table.rows):
            cells = dict(row)
            for column, cell in row.items():
                place = f"{name}/{number:02d}/{column}"
                if isinstance(cell, Picture):
                    cells[column] = _file(place, step, "png")
                elif isinstance(cell, Html):
                    cells[column] = _file(place, step, "html")
                    client.log_text(run, cell.code, artifact_file=cells[column])
            rows.append(cells)
        content = {"columns": list(table.columns), "rows": rows}
        text = json.dumps(content, ensure_ascii=False)
        client.log_text(run, text, artifact_file=_file(f"{name}/table", step, "json"))


def _file(name: str, step: int, kind: str) -> str:
    folder, _, last = name.partition("/")
    return "/".join([_allowed(folder), f"step_{step:06d}", f"{_allowed(last or folder)}.{kind}"])


def _allowed(name: str) -> str:
    """``name`` in the letters that MLflow and Lightning take; different ones stay different."""
    parts = (re.sub(r"[^A-Za-z0-9_. -]", lambda odd: f"_{ord(odd[0]):x}", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)[:_LONGEST]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of tables and an experiment that are new, as in every run they are."""
    talking = [logging.getLogger(name) for name in ("mlflow", "lightning.pytorch.loggers.mlflow", "alembic")]
    levels = [one.level for one in talking]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of releases of SQLAlchemy that MLflow does not know yet
        import mlflow  # noqa: F401  it gives its loggers their levels

        for one in talking:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(talking, levels, strict=True):
                one.setLevel(level)
