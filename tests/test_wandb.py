"""A run's numbers and media for W&B, read back from the file of the offline run; the same numbers in CSV."""

import csv
import json
import os
from pathlib import Path

import pytest
import wandb
from PIL import Image
from support import training_models
from support.offline_run import OfflineRun, records

from clipmapper.commands.train import train
from clipmapper.data.world.questions import FAMILIES
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES
from clipmapper.relevance import COMPARED as METHODS
from clipmapper.settings.schema import WandbLoggerConfig
from clipmapper.training.loggers import logged_files, run_logger
from clipmapper.training.run_folder import RESULTS

COLUMNS = ["image", "heat map", "question", "family", "answer", "truth", "probability", "curves"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return training_models.trained_by_script(tmp_path_factory)


@pytest.fixture(scope="module")
def results(trained) -> dict:
    return json.loads((trained.run_folder / "results.json").read_text())


@pytest.fixture(scope="module")
def offline(trained, results) -> OfflineRun:
    folder = trained.folder / results["files"]["W&B run"]
    assert folder.parent == trained.run_folder / "wandb" and folder.name.startswith("offline-run-")
    return OfflineRun(folder)


def scalar_names() -> list[str]:
    perturbation = [f"perturbation/{m}/{d}/{x}" for m in MODALITIES for d in DIRECTIONS for x in METHODS]
    localisation = [
        f"localisation/{m}/{score}/{x}"
        for m in MODALITIES
        for score in ("mass", "rank", "pointing")
        for x in METHODS
    ]
    return [*perturbation, *(f"{name}/probability" for name in perturbation), *localisation]


def in_results(explanations: dict, name: str) -> float:
    what, modality, kind, method, *probability = name.split("/")
    if what == "localisation":
        return explanations[what][modality]["methods"][method][kind]["mean"]
    return explanations[what][modality][kind]["probability" if probability else "accuracy"][method]["area"][
        "mean"
    ]


def test_run_is_complete_and_asked_for_nothing(offline, trained):
    assert offline.status == 0
    assert (offline.run.project, offline.run.display_name) == ("clipmapper", "vqa_scenes")
    assert "wandb" not in trained.errors.lower()


def test_scalars_of_training_and_validation(offline, results):
    assert offline.logged("trainer/global_step")[-1] == 6
    for family in (*FAMILIES, "overall"):
        for split in ("validation", "held_out"):
            (logged,) = offline.logged(f"{split}/accuracy/{family}")
            assert logged == pytest.approx(results["accuracy"][family][split])


def test_scalars_of_the_explanations(offline, results):
    assert "perturbation/image/positive/weighted" in scalar_names()
    for name in scalar_names():
        (logged,) = offline.logged(name)
        assert logged == pytest.approx(in_results(results["explanations"], name)), name


def test_pictures(offline):
    for name in ("methods", "perturbation_accuracy", "perturbation_probability"):
        (path,) = offline.logged(f"pictures/{name}.path")
        assert offline.logged(f"pictures/{name}._type") == ["image-file"]
        assert path in offline.files
        with Image.open(offline.folder / "files" / path) as image:
            image.load()
            assert min(image.size) > 400


def test_table_of_explanations(offline, trained):
    assert offline.logged("explanations._type") == ["table-file"]
    assert offline.logged("explanations.nrows") == [1]
    (artifact,) = offline.artifacts
    assert artifact.type == "run_table"
    # A table's pictures are kept where wandb stages what it is going to upload.
    contents = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(contents["explanations.table.json"].read_text())
    assert table["columns"] == COLUMNS
    (row,) = table["data"]
    cells = dict(zip(COLUMNS, row, strict=True))

    with Image.open(contents[cells["image"]["path"]]) as image:
        assert image.size == (72, 72)
    pictures = trained.run_folder / "pictures"
    (drawn,) = pictures.glob("explanation_00_*.png")
    assert contents[cells["heat map"]["path"]].read_bytes() == drawn.read_bytes()
    curves = (pictures / "curves" / drawn.name).read_bytes()
    assert contents[cells["curves"]["path"]].read_bytes() == curves

    question = contents[cells["question"]["path"]].read_text()
    assert question.count("background") > 2 and "?" in question
    assert cells["family"] in FAMILIES and drawn.stem.endswith(cells["family"])
    assert isinstance(cells["answer"], str) and isinstance(cells["truth"], str)
    assert 0 < cells["probability"] < 1


@pytest.mark.slow
def test_csv_holds_the_same_numbers(tmp_path):
    """With a validation in the middle of training, one at the end, and one behind the last whole interval."""
    architecture = training_models.tiny_clip(tmp_path)
    folder = train(
        training_models.train_settings(
            *training_models.SMALL_RUN,
            f"encoder.architecture={architecture}",
            f"output={tmp_path}",
            "logger=csv",
            "callbacks.samples=3",
            "trainer.val_check_interval=4",
            "callbacks.pictures=0",
        )
    )
    results = json.loads((folder / "results.json").read_text())
    assert not (folder / "wandb").exists() and "W&B run" not in results["files"]
    with Path(results["files"]["metrics"]).open() as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> dict[int, float]:
        return {int(row["step"]): float(row[name]) for row in rows if row[name]}

    for name in scalar_names():
        values = column(name)
        assert list(values) == [4, 6]
        assert values[6] == pytest.approx(in_results(results["explanations"], name))
    for family in FAMILIES:
        values = list(column(f"validation/accuracy/{family}").values())
        best = [step for step, _ in results["best"]["validations"]].index(results["best"]["step"])
        assert len(values) == 2
        assert values[best] == pytest.approx(results["accuracy"][family]["validation"])


# The file of an offline run is complete when the run says where it is.


@pytest.fixture
def offline_logger(tmp_path, monkeypatch):
    """``offline_logger()`` in a block: a logger of a run in ``tmp_path / "run"``."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    (tmp_path / "run").mkdir()
    settings = WandbLoggerConfig(
        _target_="lightning.pytorch.loggers.WandbLogger", project="of the test", mode="offline"
    )
    return lambda: run_logger(settings, tmp_path / "run", "small")


@pytest.mark.slow
def test_run_beside_one_of_the_calling_program(tmp_path, monkeypatch):
    """W&B's service then runs already, in another working directory, and the output's path is relative."""
    architecture = training_models.tiny_clip(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    own = wandb.init(
        mode="offline", dir=tmp_path / "first", project="own", settings=wandb.Settings(silent=True)
    )
    try:
        monkeypatch.chdir(tmp_path / "second")
        overrides = (*training_models.SMALL_RUN, "callbacks=none", "training.max_steps=1")
        folder = train(training_models.train_settings(*overrides, f"encoder.architecture={architecture}"))
        own.log({"mine": 3})
    finally:
        own.finish()
        wandb.teardown()
    assert not folder.is_absolute() and not list((tmp_path / "first").glob("outputs"))
    logged = Path(json.loads((folder / RESULTS).read_text())["files"]["W&B run"])
    assert logged.parent == folder / "wandb"
    (path,) = logged.glob("run-*.wandb")
    assert any(record.WhichOneof("record_type") == "history" for record in records(path))
    assert OfflineRun(Path(own.dir).parent).logged("mine") == [3]


@pytest.mark.slow
def test_file_is_complete_at_once(offline_logger, tmp_path):
    for number in range(3):
        with offline_logger() as logger:
            logger.log_metrics({"number": number, "filling": "x" * 100_000})
        run = OfflineRun(logged_files(logger, tmp_path / "run")["W&B run"])
        assert run.status == 0 and run.logged("number") == [number]
        assert "WANDB_SERVICE" not in os.environ  # or the next process would write by way of this one's


@pytest.mark.slow
def test_run_that_fails_is_complete_too(offline_logger, tmp_path):
    with pytest.raises(KeyboardInterrupt), offline_logger() as logger:
        logger.log_metrics({"number": 7})
        raise KeyboardInterrupt
    run = OfflineRun(logged_files(logger, tmp_path / "run")["W&B run"])
    assert run.status == 1 and run.logged("number") == [7]


@pytest.mark.slow
def test_lost_file_is_said(offline_logger, tmp_path):
    with offline_logger() as logger:
        (path,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
        path.unlink()
    with pytest.warns(UserWarning, match=r"no run-\*\.wandb in .*offline-run-.*results\.json"):
        assert logged_files(logger, tmp_path / "run") == {}


@pytest.mark.parametrize("error", [RuntimeError("no service"), SystemExit(3)])
def test_results_outlive_a_service_that_fails(offline_logger, monkeypatch, error):
    def failing(*args, **kwargs):
        raise error

    with pytest.warns(UserWarning, match="the run could not be finished"), offline_logger() as logger:
        run, finish = logger.experiment, type(logger.experiment).finish
        monkeypatch.setattr(type(run), "finish", failing)
    finish(run)
    wandb.teardown()
