"""Which run is gone on with, and what a run promises of it: both as the disk has it."""

import os
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from support import training_models
from support.training_models import ROOT

from clipmapper.errors import UserError
from clipmapper.training import run_folder
from clipmapper.training.checkpoint import write_checkpoint
from clipmapper.training.endings import Unfinished
from clipmapper.training.processes import Share
from clipmapper.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    NUMBER,
    PROCESSES,
    RESULTS,
    folder_to_resume,
    new_run_folder,
    newest_run,
    only_one,
)

SETTINGS = {"seed": 0, "trainer": {"timeout_minutes": 30.0, "devices": "1"}}


def at(monkeypatch, time: str) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(time)

    monkeypatch.setattr(run_folder, "datetime", Clock)


def begun(output: Path, step: int | None = 1, finished: bool = False) -> Path:
    folder = new_run_folder(str(output), "name", SETTINGS)
    if step is not None:
        write_checkpoint({"global_step": step, "state_dict": {}}, folder / CHECKPOINT)
    if finished:
        (folder / RESULTS).write_text("{}")
    return folder


def to_resume(output: Path, resume: bool | str = True, **changed) -> Path:
    return folder_to_resume(str(output), "name", SETTINGS | changed, resume)


def test_as_many_processes_as_before(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    assert to_resume(tmp_path) == folder
    monkeypatch.setattr(run_folder, "this_share", lambda: Share(0, 2))
    with pytest.raises(UserError, match=r"started with 1 processes .*, these are 2"):
        to_resume(tmp_path)
    (folder / PROCESSES).unlink()  # of a run that was begun when nobody counted
    assert to_resume(tmp_path) == folder


def test_a_run_that_was_begun_before_there_was_the_setting(tmp_path):
    folder = begun(tmp_path)
    assert to_resume(tmp_path, training={"validation_samples": None}, data={"decoding": "exact"}) == folder
    with pytest.raises(UserError, match=r"data\.decoding is not what .*exact"):
        to_resume(tmp_path, data={"decoding": "fast"})


def test_the_run_that_was_started_last_whatever_the_clock_says(tmp_path, monkeypatch):
    at(monkeypatch, "2030-01-01 12:00:00")
    begun(tmp_path)
    at(monkeypatch, "2029-01-01 12:00:00")  # set back
    folders = [begun(tmp_path) for _ in range(21)]
    assert to_resume(tmp_path) == folders[-1] and folders[-1].name.endswith("+21")


def test_runs_that_were_not_numbered(tmp_path, monkeypatch):
    """Those of earlier versions: by time, then by number, not by letter."""
    at(monkeypatch, "2029-01-01 12:00:00")
    folders = [begun(tmp_path) for _ in range(20)]
    for folder in folders:
        (folder / NUMBER).unlink()
    assert to_resume(tmp_path).name == "2029-01-01_12-00-00+20"


def test_two_runs_in_one_second_have_a_folder_each(tmp_path, monkeypatch):
    """Also where the other makes its folder between a look at the disk and the making."""
    at(monkeypatch, "2029-01-01 12:00:00")
    original, others = Path.mkdir, []

    def mkdir(folder, *arguments, **options):
        if folder.name == "2029-01-01_12-00-00" and not others:
            others.append(original(folder, parents=True))
        return original(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert begun(tmp_path).name == "2029-01-01_12-00-00+2"


def test_an_interrupted_run_behind_a_finished_one(tmp_path):
    stopped, _later = begun(tmp_path, step=7), begun(tmp_path, finished=True)
    with pytest.raises(
        UserError, match=r"is finished; resume=\S+ goes on with the last that is not"
    ) as caught:
        to_resume(tmp_path)
    named = str(caught.value).partition("; resume=")[2].split()[0]
    assert to_resume(tmp_path, named) == stopped  # the line's promise


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda run: (run / RESULTS).write_text("{}"), "that run is finished"),
        (lambda run: (run / CHECKPOINT).unlink(), "has left no checkpoint"),
        (lambda run: (run / CONFIG).unlink(), r"not the folder of a run \(there is no config.yaml\)"),
        (lambda run: (run / CONFIG).write_text("[1]"), "no settings of a run"),
        (lambda run: (run / CONFIG).write_bytes(b"\xff\xfe: ["), "no settings of a run"),
        (lambda run: (run / CONFIG).write_text(yaml.safe_dump({**SETTINGS, "seed": 1})), "seed is not what"),
    ],
)
def test_a_folder_that_nothing_goes_on_with_is_one_line(tmp_path, spoil, line):
    folder = begun(tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=line) as caught:
        to_resume(tmp_path, str(folder))
    assert str(caught.value).startswith(f"resume={folder}: ") and "\n" not in str(caught.value)


def test_where_and_how_long_may_change(tmp_path):
    folder = begun(tmp_path)
    trainer = {"timeout_minutes": 5.0, "devices": "1"}
    assert to_resume(tmp_path, trainer=trainer) == folder
    with pytest.raises(UserError, match=r"trainer.devices is not what"):
        to_resume(tmp_path, trainer=trainer | {"devices": "2"})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("true", True),
        ("false", False),
        ("1", True),
        ("off", False),
        ("FOLDER, with a comma", "FOLDER, with a comma"),
    ],
)
def test_setting(tmp_path, monkeypatch, given, read):
    monkeypatch.chdir(tmp_path)
    Path("FOLDER, with a comma").mkdir()
    override = given if " " not in given else f"'{given}'"
    assert training_models.train_settings(f"resume={override}").resume == read


def test_setting_that_names_nothing():
    with pytest.raises((UserError, HydraException), match="not true, not false and not a run's folder"):
        training_models.train_settings("resume=nowhere")


# What is promised


@pytest.fixture
def way_on(tmp_path, monkeypatch):
    """The way on of a run with the settings that these folders are begun with."""
    config = training_models.train_settings(f"output={tmp_path}", "name=name")
    monkeypatch.setattr(
        sys.modules[__name__], "SETTINGS", {k: v for k, v in asdict(config).items() if k != "resume"}
    )
    return lambda folder: Unfinished(config, folder).way_on()


def test_every_promise_holds(way_on, tmp_path):
    first = begun(tmp_path, step=7)
    assert way_on(first) == "7 steps are saved: the same command with resume=true goes on"
    second = begun(tmp_path, step=9)
    assert way_on(first) == f"7 steps are saved: the same command with resume={first} goes on"
    assert to_resume(tmp_path, str(first)) == first and newest_run(tmp_path / "name") == second


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: (run / CHECKPOINT).unlink(),
        lambda run: (run / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes()[:100]),
        lambda run: (run / CONFIG).unlink(),
        lambda run: (run / CONFIG).write_text("[1]"),
    ],
    ids=["no checkpoint", "cut checkpoint", "no settings", "other settings"],
)
def test_nothing_is_promised_that_resume_would_refuse(way_on, tmp_path, spoil):
    folder = begun(tmp_path, step=7)
    spoil(folder)
    assert "goes on" not in way_on(folder)


# One at a time

HOLD = """
import sys
from pathlib import Path
from clipmapper.training.run_folder import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_run_that_is_running_is_not_gone_on_with(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"a run is running there already \(process {holder.pid} on "),
        only_one(tmp_path),
    ):
        pass
    holder.kill()  # the lock goes with it, whatever it left
    holder.communicate()
    with only_one(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
