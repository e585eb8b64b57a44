"""Any logger of Lightning's: it is the one that was asked for, and what it has written is read back."""

import json
import sqlite3
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from support import training_models
from support.offline_run import OfflineRun

from clipmapper.commands.train import train
from clipmapper.errors import UserError
from clipmapper.settings.schema import (
    CSVLoggerConfig,
    MLflowLoggerConfig,
    OtherLoggerConfig,
    TensorBoardLoggerConfig,
)
from clipmapper.training.loggers import check_logger, log_media, logged_files, run_logger
from clipmapper.training.shown import Html, MediaTable, Picture

LIGHTNING = "lightning.pytorch.loggers"
CSV = CSVLoggerConfig(_target_=f"{LIGHTNING}.CSVLogger")
TENSORBOARD = TensorBoardLoggerConfig(_target_=f"{LIGHTNING}.TensorBoardLogger")
MLFLOW = MLflowLoggerConfig(
    _target_="clipmapper.training.mlflow_runs.MLflowRun", experiment_name="trials", tracking_uri=None
)
PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
ODD = "validation/accuracy/yes/no?"  # names of families are the data's


def other(target: str, **options) -> OtherLoggerConfig:
    return OtherLoggerConfig(_target_=target, options=options)


class Lines(Logger):
    """A user's own logger, which knows no pictures: a line of JSON for each call."""

    name, version = "lines", 0

    def __init__(self, save_dir: str, mark: str = "") -> None:
        super().__init__()
        self.file, self.mark = Path(save_dir) / "lines.jsonl", mark
        self.file.parent.mkdir(parents=True)

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params) -> None:
        """Nothing."""

    def log_metrics(self, metrics, step=None) -> None:
        self._add({"step": step, **metrics})

    def finalize(self, status: str) -> None:
        self._add({"ended": status, "mark": self.mark})

    def _add(self, line: dict) -> None:
        with self.file.open("a") as file:
            print(json.dumps(line), file=file)


class Forgetful(Lines):
    def finalize(self, status: str) -> None:
        raise OSError("the server is gone")


def not_a_logger(save_dir: str) -> Path:
    return Path(save_dir)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


def events(folder: Path):
    """Read a run as TensorBoard itself does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return found.Reload()


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def media(folder: Path) -> dict:
    path = folder / "methods.png"
    Image.fromarray(PIXELS).save(path)
    cells = {"image": Picture(PIXELS), "drawn": Picture(path), "asked": Html("<b>é?</b>"), "says": "a|b"}
    table = MediaTable([*cells, "share"], [{**cells, "share": 0.5}])
    return {"pictures/methods": Picture(path), "explanations": table}


def logged(settings, folder: Path) -> dict[str, Path]:
    """Two numbers, a picture and a table, logged after a first end of the run as by a task's results."""
    folder.mkdir(parents=True)
    check_logger(settings)
    with run_logger(settings, folder, "small") as logger:
        logger.log_metrics({"a": 1.5, "a/b": 2.0, ODD: 0.25}, step=6)
        logger.finalize("success")
        log_media([logger], lambda: media(folder), step=6)
    return logged_files(logger, folder)


def test_tensorboard_has_numbers_pictures_and_words(tmp_path):
    pytest.importorskip("tensorboard")
    files = logged(TENSORBOARD, tmp_path / "run")
    assert files == {"TensorBoard": tmp_path / "run" / "tensorboard" / "version_0"}
    found = events(files["TensorBoard"])
    assert [(e.step, e.value) for e in found.Scalars("a/b")] == [(6, 2.0)]
    assert [(e.step, e.value) for e in found.Scalars(ODD)] == [(6, 0.25)]
    names = {"pictures/methods", "explanations/00/image", "explanations/00/drawn"}
    assert set(found.Tags()["images"]) == names
    for name in names:
        (image,) = found.Images(name)
        (tmp_path / "read.png").write_bytes(image.encoded_image_string)
        assert (image.step, np.asarray(Image.open(tmp_path / "read.png")).tolist()) == (6, PIXELS.tolist())
    (words,) = found.Tensors("explanations/text_summary")
    text = words.tensor_proto.string_val[0].decode()
    assert text == "| says | share |\n| --- | --- |\n| a\\|b | 0.5 |"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "a run #1 é"])
def test_mlflow_has_numbers_pictures_and_tables(tmp_path, place):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    files = logged(MLFLOW, tmp_path / place)
    folder = tmp_path / place / "mlflow"
    assert files == {"MLflow": folder}
    database = folder / "mlflow.db"
    assert sorted(rows(database, "select key, step, value from metrics")) == [
        ("a", 6, 1.5),
        ("a/b", 6, 2.0),
        ("validation/accuracy/yes/no_3f", 6, 0.25),
    ]
    assert rows(database, "select name, status from runs") == [("small", "FINISHED")]
    assert ("trials",) in rows(database, "select name from experiments")
    (artifacts,) = (folder / "artifacts").glob("*/artifacts")
    names = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*")}
    drawn = {
        "pictures/step_000006/methods.png",
        "explanations/step_000006/00/image.png",
        "explanations/step_000006/00/drawn.png",
    }
    page, table = "explanations/step_000006/00/asked.html", "explanations/step_000006/table.json"
    assert names == {*drawn, page, table}
    for name in drawn:
        assert np.asarray(Image.open(artifacts / name)).tolist() == PIXELS.tolist()
    assert (artifacts / page).read_text(encoding="utf-8") == "<b>é?</b>"
    found = json.loads((artifacts / table).read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert found["columns"] == list(row) and (row["says"], row["share"]) == ("a|b", 0.5)
    assert row["image"] in drawn and row["asked"] == page


@pytest.mark.slow
def test_mlflow_takes_any_number_of_metrics_by_any_name(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    named = {"色": 1.0, "../up": 2.0, "a?": 3.0, "a!": 4.0, "x" * 300: 5.0, "/": 6.0, "nan": float("nan")}
    many = {f"m/{number}": float(number) for number in range(1100)}
    with run_logger(MLFLOW, tmp_path, "small") as logger:
        logger.log_metrics(named | many, step=1)
    keys = {key for (key,) in rows(tmp_path / "mlflow" / "mlflow.db", "select key from metrics")}
    assert len(keys) == len(named) + len(many)
    assert {"_8272", "_/up", "a_3f", "a_21", "x" * 250, "_/_", "m/1099"} <= keys


def test_mlflow_that_does_not_begin_is_one_line(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database at all, but a text" * 50)
    with (
        pytest.raises(UserError, match="MLflow did not begin the run") as told,
        run_logger(MLFLOW, tmp_path, "small"),
    ):
        pass
    assert "\n" not in str(told.value)
    with (
        pytest.raises(UserError, match=r"its database can't be in .*what"),
        run_logger(MLFLOW, tmp_path / "what?", "small"),
    ):
        pass
    server = MLflowLoggerConfig(
        _target_=MLFLOW._target_, experiment_name="trials", tracking_uri="http://127.0.0.1:9"
    )
    with pytest.raises(UserError, match=r"logger.tracking_uri: no answer from http://127.0.0.1:9 within"):
        check_logger(server)


def test_a_logger_without_pictures_has_the_numbers_and_makes_none(tmp_path):
    files = logged(other(f"{__name__}.Lines", mark="mine"), tmp_path / "run")
    assert files == {"logs": tmp_path / "run" / "logs"}
    lines = [json.loads(line) for line in (files["logs"] / "lines.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 6, "a": 1.5, "a/b": 2.0, ODD: 0.25}
    assert lines[-1] == {"ended": "success", "mark": "mine"}
    assert not (tmp_path / "run" / "methods.png").exists()  # which media() draws
    files = logged(CSV, tmp_path / "csv run")
    assert files == {"metrics": tmp_path / "csv run" / "csv" / "version_0" / "metrics.csv"}
    assert files["metrics"].read_text().splitlines() == [f"a,a/b,step,{ODD}", "1.5,2.0,6,0.25"]


def test_every_logger_is_the_one_that_was_asked_for(tmp_path):
    """A target of Lightning's, too, by ``other``, whose options are its own."""
    pytest.importorskip("tensorboard")
    options = {"name": "mine", "version": "one", "max_queue": 3}
    with run_logger(other(TENSORBOARD._target_, **options), tmp_path, "small") as logger:
        logger.log_metrics({"a": 1.0}, 1)
    assert logged_files(logger, tmp_path) == {"TensorBoard": tmp_path / "tensorboard" / "mine" / "one"}
    with run_logger(other(f"{LIGHTNING}.WandbLogger", project="p", tags=["t"]), tmp_path, "small") as logger:
        logger.log_metrics({"a": 1.0}, 1)
        log_media([logger], lambda: media(tmp_path), step=6)
    run = OfflineRun(logged_files(logger, tmp_path)["W&B run"])
    assert (run.run.project, list(run.run.tags), run.logged("a")) == ("p", ["t"], [1.0])
    assert run.logged("explanations.nrows") == [1] and run.logged("pictures/methods._type") == ["image-file"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (other("pathlib.Path"), "pathlib.Path: not a subclass of Lightning's Logger"),
        (other("lightning.fabric.loggers.CSVLogger", root_dir="x"), "not a subclass of Lightning's Logger"),
        (other("my_package.Logger"), "logger._target_=my_package.Logger: "),
        (other(CSV._target_, colour="red"), "got an unexpected keyword argument 'colour'"),
        (other(f"{LIGHTNING}.WandbLogger", colour="red"), "got an unexpected keyword argument 'colour'"),
    ],
)
def test_mistakes_are_said_before_data_are_read(settings, says):
    with pytest.raises(UserError) as told:
        check_logger(settings)
    assert says in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "packages", "extra"),
    [(TENSORBOARD, ("tensorboard", "tensorboardX"), "tensorboard"), (MLFLOW, ("mlflow",), "mlflow")],
)
def test_a_missing_package_is_one_line_with_its_extra(settings, packages, extra, monkeypatch):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {extra}: pip install 'clipmapper\[{extra}\]'") as told:
        check_logger(settings)
    assert "\n" not in str(told.value)


def test_what_is_found_out_late_is_one_line_too(tmp_path, monkeypatch):
    with (
        pytest.raises(UserError, match="not_a_logger: not a subclass"),
        run_logger(other(f"{__name__}.not_a_logger"), tmp_path, "small"),
    ):
        pass
    monkeypatch.setattr(Lines, "__init__", lambda self, save_dir: __import__("no_such_package"))
    with (
        pytest.raises(UserError, match="Lines: No module named 'no_such_package'"),
        run_logger(other(f"{__name__}.Lines"), tmp_path, "small"),
    ):
        pass
    monkeypatch.setattr(Lines, "__init__", lambda self, save_dir: {}["key"])
    with (
        pytest.raises(UserError, match=r"_target_=.*Lines: it did not start \(KeyError: 'key'\)\Z"),
        run_logger(other(f"{__name__}.Lines"), tmp_path, "small"),
    ):
        pass


def test_results_outlive_a_logger_that_fails_at_the_end(tmp_path):
    with (
        pytest.warns(UserWarning, match="Forgetful could not be finished: OSError"),
        run_logger(other(f"{__name__}.Forgetful"), tmp_path, "small") as logger,
    ):
        pass
    assert logged_files(logger, tmp_path) == {}
    with (
        pytest.raises(KeyboardInterrupt),
        run_logger(other(f"{__name__}.Lines"), tmp_path / "2", "") as logger,
    ):
        raise KeyboardInterrupt
    assert json.loads(logger.file.read_text())["ended"] == "failed"


def test_a_file_that_is_not_there_is_not_named(tmp_path):
    with run_logger(CSV, tmp_path, "small") as logger:
        logger.log_metrics({"a": 1.0}, 1)
    (file,) = logged_files(logger, tmp_path).values()
    file.unlink()
    with pytest.warns(UserWarning, match="CSVLogger has not written"):
        assert logged_files(logger, tmp_path) == {}


def test_wandb_is_in_one_file():
    package = Path(__file__).resolve().parents[1] / "clipmapper"
    found = {path.name for path in package.rglob("*.py") if "import wandb" in path.read_text()}
    assert found == {"wandb_runs.py"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorboard", "mlflow", "lines"])
def test_a_run_logs_where_it_is_told_to(tmp_path, kind):
    """The numbers of ``results.json``, by the command's own way, and never to W&B or CSV instead."""
    chosen = [f"logger={kind}"]
    if kind == "lines":
        chosen = ["logger=other", f"logger._target_={__name__}.Lines", "+logger.options.mark=mine"]
    else:
        pytest.importorskip(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = train(
            training_models.train_settings(
                *training_models.SMALL_RUN,
                f"encoder.architecture={training_models.tiny_clip(tmp_path)}",
                f"output={tmp_path}",
                "callbacks.methods=[weighted,random]",
                *chosen,
            )
        )
    results = json.loads((folder / "results.json").read_text())
    assert not (folder / "wandb").exists() and not (folder / "csv").exists()
    area = results["explanations"]["perturbation"]["image"]["positive"]["accuracy"]
    names = {f"perturbation/image/positive/{m}": area[m]["area"]["mean"] for m in ("weighted", "random")}
    names["validation/accuracy/overall"] = results["accuracy"]["overall"]["validation"]
    if kind == "tensorboard":
        found = events(Path(results["files"]["TensorBoard"]))
        values = {name: found.Scalars(name)[-1].value for name in names}
        assert {"pictures/methods", "explanations/00/heat map"} <= set(found.Tags()["images"])
    elif kind == "mlflow":
        place = Path(results["files"]["MLflow"])
        values = dict(rows(place / "mlflow.db", "select key, value from latest_metrics"))
        assert len(list(place.glob("artifacts/*/artifacts/pictures/step_000006/*.png"))) == 3
    else:
        values = {}
        for line in (Path(results["files"]["logs"]) / "lines.jsonl").read_text().splitlines():
            values |= json.loads(line)
        assert values["ended"] == "success" and (folder / "pictures" / "methods.png").exists()
        assert results["settings"]["logger"]["options"] == {"mark": "mine"}
    for name, value in names.items():
        assert values[name] == pytest.approx(value), name
