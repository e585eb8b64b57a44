"""A study of small models: what it writes, what it does not compute again, and what it says when stopped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.training_models import SMALL_RUN, tiny_clip, tiny_model, train_settings

from clipmapper.commands import study_cells
from clipmapper.commands.study import study
from clipmapper.commands.study_files import read_values
from clipmapper.commands.study_models import run_settings, study_models
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.models.exported import write_model
from clipmapper.settings.study import StudyConfig
from clipmapper.tasks.vqa.task import TASK
from clipmapper.training.checkpoint_data import data_description

METHODS = ["weighted", "gae", "random"]
WORLD = (
    "data.train_scenes=40",
    "data.simple_scenes=20",
    "data.validation_scenes=30",
    "data.held_out_scenes=20",
)


def settings(output: Path, models: dict, **changes) -> StudyConfig:
    given = StudyConfig(
        models=models, training=["logger=csv", "callbacks=none"], seeds=[0, 1], data=None, split="validation",
        methods=METHODS, scores=["removal", "sanity"], caption_scores=["log_probability"], word_maps=None,
        samples=8, fewer={"sanity": 3}, of_model={}, judged=True, only_model=None, only_seed=None,
        output=str(output),
        resume=True, jobs=1, threads=None, batch_size=128, chunk=4, pictures=1, confidence=0.9, seed=0,
        device="cpu",
    )  # fmt: skip
    return replace(given, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("first", "second")):
        model = tiny_model(tiny_clip(folder), seed=seed)
        model.description["data"] = data_description(train_settings(*WORLD).data)
        write_model(model, folder / name, "a card")
        found[name] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> StudyConfig:
    config = settings(tmp_path_factory.mktemp("study"), models)
    study(config)
    return config


def test_what_is_written(finished):
    folder = Path(finished.output)
    results = json.loads((folder / "study.json").read_text())
    told = results["study"]
    assert told["settings"]["samples"] == 8 and told["command"] and told["machine"]["name"]
    assert told["version"] and (told["commit"] is None or len(told["commit"].rstrip("+")) == 40)
    assert list(results["cells"]) == ["first", "second"]
    for about in results["cells"].values():
        assert set(about["seconds_a_sample"]) == set(METHODS) and about["task"] == "vqa"
        assert about["unchanged"] == ["random"]  # which looks at nothing but its seed
        assert set(about["seconds"]) == {"removal (8 samples)", "sanity (3 samples)"}
    table = results["sections"]["vqa"]
    assert table["methods"]["random"]["unchanged_in"] == 2
    gap = table["quantities"]["removal/gap/probability"]
    assert gap["samples"] == 8 and set(gap["methods"]["gae"]["groups"]) == {"answer", "family"}
    assert len(results["claims"]) == 16  # models × modalities × directions × accuracy and probability
    page = (folder / "leaderboard.md").read_text()
    assert "| random † |" in page and "Is weighted better?" in page and "family: colour" in page
    html = (folder / "leaderboard.html").read_text()
    for picture in (folder / "pictures").glob("*.png"):
        assert f"pictures/{picture.name}" in html and f"pictures/{picture.name}" in page
    assert len(list((folder / "pictures").glob("*.png"))) >= 4


def test_every_value_is_read_back(finished):
    values = read_values(Path(finished.output) / "study_values.npz")
    results = json.loads((Path(finished.output) / "study.json").read_text())
    assert set(values) == {"first", "second"}
    its = values["first"]
    assert its.methods == tuple(METHODS) and len(its.sample_ids) == 8
    assert set(its.groups["answer"]) <= {"right", "wrong"} and len(its.groups["family"]) == 8
    place = its.place("vqa", "removal/gap/probability")
    of_cells = [its.mean(place, its.scored(place))[1] for its in values.values()]
    kept = results["sections"]["vqa"]["quantities"]["removal/gap/probability"]["methods"]["gae"]["of_cells"]
    assert of_cells == pytest.approx(kept)
    sanity = its.place("vqa", "sanity/image/all")
    assert its.scored(sanity).sum() == 3 and np.isnan(its.values[sanity, :, 3:]).all()


def test_a_finished_model_is_not_computed_again(finished, monkeypatch):
    before = (Path(finished.output) / "study.json").read_text()

    def report(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(type(TASK), "report", report)
    study(replace(finished, confidence=0.5, jobs=2))  # neither of which the values depend on
    assert (Path(finished.output) / "study.json").read_text() != before
    with pytest.raises(AssertionError, match="computed again"):
        study(replace(finished, samples=7))


def test_parts_of_a_study(models, tmp_path, capsys):
    config = settings(tmp_path, models, scores=["removal"], fewer={}, samples=4)
    study(replace(config, only_model="second"))
    assert "1 of 2 models are finished, not first" in capsys.readouterr().out
    assert not (tmp_path / "study.json").exists()
    study(replace(config, only_model="first", only_seed=0))
    assert (tmp_path / "study.json").exists()
    with pytest.raises(UserError, match="first is one model"):
        study(replace(config, only_model="first", only_seed=1))


def test_interrupted_it_says_what_is_kept(models, tmp_path, monkeypatch):
    config = settings(tmp_path, models, scores=["removal"], fewer={}, samples=8)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study_cells, "_alone", stop)
        with pytest.raises(RunInterrupted) as stopped:
            study(config)
    assert str(stopped.value) == (
        "scoring first: 2 chunks saved; 0 of 2 models are finished: the same command goes on"
    )
    study(config)
    assert (tmp_path / "study.json").exists()


def test_wrong_models_end_it_before_anything_begins(tmp_path, models):
    with pytest.raises(UserError, match=r"models\.second=/nowhere: there is no such file"):
        study(settings(tmp_path, models | {"second": "/nowhere"}))
    with pytest.raises(UserError, match=r"models\.trained: .*did you mean"):
        study(settings(tmp_path, models | {"trained": ["training.max_stepz=3"]}))
    with pytest.raises(UserError, match=r"models\.trained: seed is for the study to say"):
        study(settings(tmp_path, models | {"trained": ["seed=3"]}))
    assert not list(tmp_path.glob("cells/*/values.npz"))


def test_settings_of_trainings(tmp_path):
    config = settings(tmp_path, {"mine": ["logger=tensorboard"], "other": "scenes-vqa"})
    first, other, second = study_models(config)
    assert (first.name, other.name, second.name) == ("mine/0", "other", "mine/1")
    assert first.given == ("callbacks=none", "logger=tensorboard")
    names = {run_settings(cell).name for cell in (first, second)}
    assert len(names) == 2 and all(name.startswith("training_") for name in names)


@pytest.mark.slow
def test_models_are_trained_once(tmp_path, monkeypatch):
    small = [one for one in SMALL_RUN if not one.startswith("callbacks.")]
    given = [*small, f"encoder.architecture={tiny_clip(tmp_path)}"]
    config = settings(
        tmp_path / "study", {"mine": given}, scores=["removal"], fewer={}, samples=4, jobs=2, threads=1
    )
    study(config)
    results = json.loads((tmp_path / "study" / "study.json").read_text())
    assert list(results["cells"]) == ["mine/0", "mine/1"]
    assert results["cells"]["mine/0"]["sha256"] != results["cells"]["mine/1"]["sha256"]
    assert len(results["agreement"]["vqa"]) == 2
    assert (tmp_path / "study" / "cells" / "mine" / "0" / "log.txt").read_text()
    monkeypatch.setattr("clipmapper.commands.train.train", lambda *_: pytest.fail("trained again"))
    study(replace(config, samples=5, jobs=1))


def test_a_model_with_numbers_of_its_own(tmp_path):
    config = settings(tmp_path, {"mine": "scenes-vqa"}, of_model={"mine": {"samples": 2, "removal": 1}})
    assert (config.for_model("other").samples, config.for_model("other").fewer) == (8, {"sanity": 3})
    assert (config.for_model("mine").samples, config.for_model("mine").fewer) == (
        2,
        {"sanity": 2, "removal": 1},
    )
