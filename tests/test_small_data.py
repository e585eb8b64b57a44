"""Lopsided data, few data, and whether a model looks at its images."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import training_models
from support.photographs import SETTINGS, photograph, photographs_in

from clipmapper.commands import train as command
from clipmapper.commands.train import train
from clipmapper.data.answers import AnswerVocabulary, usual_answers
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.record import Record
from clipmapper.data.records import RecordData
from clipmapper.data.tables.builder import as_table
from clipmapper.data.tables.whole import fold_by_image
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.statistics import bootstrap_interval
from clipmapper.tasks.vqa.batches import QuestionBatches, balanced_batches
from clipmapper.tasks.vqa.blind import beyond_blind, blind_accuracies, unseeing_lines
from clipmapper.training.measures import Measure
from clipmapper.training.processes import Share
from clipmapper.training.run_folder import RESULTS

ANSWERS = ["yes"] * 60 + ["no"] * 30 + ["red"] * 8 + ["two"] * 2


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lopsided")
    photograph((255, 0, 0)).save(folder / "a.png")
    records = [Record(n, folder / "a.png", "a", f"what {n}?", (answer,)) for n, answer in enumerate(ANSWERS)]
    model = training_models.tiny_model(training_models.tiny_clip(folder))
    vocabulary = AnswerVocabulary(["yes", "no", "red"])  # "two" is too rare
    data = RecordData({"train": records, "validation": records[:2]}, vocabulary)
    return QuestionBatches(model, data, "train", data.splits["train"], None)


def test_the_answer_that_most_people_gave():
    people = [("a dog", "Dog.", "cat"), ("cat", "dog", "dog", "cat", "zebra"), ("zebra",), ("dog", "cat")]
    records = [Record(n, b"", str(n), "q?", answers) for n, answers in enumerate(people)]
    table = as_table(records)
    found = usual_answers(table, AnswerVocabulary(["dog", "cat"]))
    assert found.tolist() == [0, 1, -1, 0]  # of as many of each the one that came first
    assert usual_answers(table.take(np.array([3, 1])), AnswerVocabulary(["cat", "dog"])).tolist() == [1, 0]


def test_every_answer_is_asked_for_equally_often(batches):
    batch_at = balanced_batches(batches, batch_size=30, seed=3)
    ids = [one for step in range(20) for one in batch_at(step)["ids"]]
    counts = Counter(ANSWERS[one] for one in ids)
    assert set(counts) == {"yes", "no", "red"} and all(abs(count - 200) < 45 for count in counts.values())
    assert len({one for one in ids if ANSWERS[one] == "red"}) == 8  # all of its questions


def test_a_step_is_always_the_same_and_shares_are_its_parts(batches):
    batch_at = balanced_batches(batches, batch_size=10, seed=3)
    whole = batch_at(7)["ids"]
    assert whole == balanced_batches(batches, batch_size=10, seed=3)(7)["ids"] != batch_at(8)["ids"]
    parts = [batch_at(7, Share(index, 2))["ids"] for index in range(2)]
    assert sorted(map(int, parts[0] + parts[1])) == sorted(map(int, whole))


# Parts of the data, each for validation in turn.


def test_every_image_is_for_validation_once():
    records = [Record(n, b"", f"image {n % 11}", "q?", ("a",)) for n in range(40)]
    parts = [fold_by_image(records, fold, 4, seed=3) for fold in (1, 2, 3, 4)]
    held = [{record.image_id for record in validation} for _, validation in parts]
    assert sorted(map(len, held)) == [2, 3, 3, 3] and len(set.union(*held)) == 11
    for (train_part, validation), images in zip(parts, held, strict=True):
        assert sorted(record.id for some in (train_part, validation) for record in some) == list(range(40))
        assert images.isdisjoint(record.image_id for record in train_part)
    again = fold_by_image(records[::-1], 2, 4, seed=3)[1]
    assert {record.image_id for record in again} == held[1]
    assert {record.image_id for record in fold_by_image(records, 2, 4, seed=4)[1]} != held[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("few"))


def test_images_for_validation_train_in_turn_and_those_for_the_test_do_not(place):
    parts = [manifest_data(str(place / "questions.jsonl"), folds=3, fold=fold) for fold in (1, 2, 3)]
    held = [{one.id for one in part.validation} for part in parts]
    assert set.union(*held) == set(range(10, 17)) and sum(map(len, held)) == 7
    for part, ids in zip(parts, held, strict=True):
        assert {one.id for one in part.train} == set(range(10, 17)) - ids
        assert [one.id for one in part.splits["test"]] == [17]
        assert any("of 3 of the images (data.folds)" in line for line in part.notes)


def test_parts_that_cannot_be(place, settings):
    path = str(place / "questions.jsonl")
    with pytest.raises(UserError, match=r"fewer images than data.folds: 7, but 8 parts"):
        manifest_data(path, folds=8, fold=1)
    with pytest.raises(UserError, match=r"data.folds=3: data.fold says which part .* 1 to 3"):
        manifest_data(path, folds=3)
    common = ("data=manifest", f"data.path={path}")
    for given, line in (
        (("data.folds=3", "data.fold=4"), "data.fold: 4 is none of the parts that data.folds=3 says"),
        (("data.fold=1",), "data.fold: 1 is none of the parts that data.folds=null says"),
        (("data.folds=1",), "data.folds: 1 is less than 2"),
    ):
        with pytest.raises(UserError, match=line):
            training_models.train_settings(*common, *given)
    with pytest.raises(UserError, match=r"data\.folds=3: one process trains them one after the other"):
        train(training_models.train_settings(*common, "data.folds=3", "trainer.devices=2"))
    none = settings("none", *common, "data.folds=8")
    with pytest.raises(UserError, match="fewer images"):
        train(none)
    assert not list(Path(none.output).glob("*/*"))


@pytest.fixture(scope="module")
def settings(place, tmp_path_factory):
    common = [one for one in SETTINGS if "callbacks." not in one]
    given = (
        *common, "callbacks=none", f"encoder.architecture={training_models.tiny_clip(place)}",
        "data.workers=0", "training.blind_steps=2",
    )  # fmt: skip
    output = tmp_path_factory.mktemp("runs")
    return lambda name, *more: training_models.train_settings(*given, f"output={output / name}", *more)


@pytest.fixture(scope="module")
def folds(settings, place):
    given = ("data=manifest", f"data.path={place / 'questions.jsonl'}", "data.folds=3")
    return lambda name, *more: settings(name, *given, "training.learning_rate=0.01", *more)


@pytest.fixture(scope="module")
def all_parts(folds):
    return train(folds("whole"))


def numbers(folder) -> dict:
    found = json.loads((folder / RESULTS).read_text())
    return {key: found[key] for key in ("objective", "scores")} | {
        "each": [one["objective"] for one in found["folds"]]
    }


def test_mean_and_spread_of_runs_on_parts(all_parts, folds):
    results = json.loads((all_parts / RESULTS).read_text())
    runs = [json.loads((all_parts.joinpath(one["folder"]) / RESULTS).read_text()) for one in results["folds"]]
    assert [run["settings"]["data"]["fold"] for run in runs] == [1, 2, 3]
    accuracies = [run["accuracy"]["overall"]["validation"] for run in runs]
    row = results["scores"]["overall"]
    assert row["values"] == accuracies and row["mean"] == pytest.approx(np.mean(accuracies))
    assert row["standard deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert results["objective"]["value"] == pytest.approx(np.mean(accuracies))
    single = train(folds("one", "data.fold=2"))  # by itself: the same run
    assert json.loads((single / RESULTS).read_text())["accuracy"] == runs[1]["accuracy"]


@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.slow
def test_stopped_in_any_part_and_resumed(all_parts, folds, monkeypatch, moment):
    """Behind the training of a part, before its results."""
    stopped = folds(f"stopped {moment}")
    done = []
    original = command.results_of

    def results_of(*args):
        if len(done) == moment:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(args)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(command, "results_of", results_of)
        with pytest.raises(
            RunInterrupted,
            match=rf"{moment} of 3 runs are finished, and 2 steps of the next are saved: .*=true goes on",
        ):
            train(stopped)
    with monkeypatch.context() as patched:
        patched.setattr(command, "results_of", lambda *args: done.append(args) or original(*args))
        done.clear()
        folder = train(replace(stopped, resume=True))
    assert len(done) == 3 - moment  # finished parts are not trained again
    assert numbers(folder) == numbers(all_parts) and len(list(folder.parent.iterdir())) == 1
    with pytest.raises(UserError, match=r"resume=true: .* is finished"):
        train(replace(stopped, resume=True))


def test_few_samples_have_intervals(all_parts):
    """Seven questions."""
    folder = all_parts / "manifest_fold_1"
    results = json.loads((next(folder.iterdir()) / RESULTS).read_text())
    found = results["intervals"]["validation"]["overall"]
    assert found["samples"] == 3 and found["accuracy"]["mean"] == results["accuracy"]["overall"]["validation"]
    assert found["accuracy"]["low"] <= found["accuracy"]["mean"] <= found["accuracy"]["high"]


# Whether a model looks at its image.


def measures(**right) -> dict:
    found = {name: np.array(hits, float) for name, hits in right.items()}
    found["overall"] = np.concatenate(list(found.values()))
    return {name: {"accuracy": Measure(hits.mean(), hits[:, None])} for name, hits in found.items()}


def test_a_model_no_better_than_without_its_images_is_told_of():
    rng = np.random.default_rng(0)
    model = measures(colour=rng.random(400) < 0.8, yes_no=rng.random(400) < 0.7, rare=np.arange(99) % 3 == 0)
    blind = measures(colour=rng.random(400) < 0.3, yes_no=rng.random(400) < 0.7, rare=np.arange(99) % 3 == 1)
    beyond = beyond_blind(model, blind, seed=1)
    for name, interval in beyond.items():
        differences = model[name]["accuracy"].columns[:, 0] - blind[name]["accuracy"].columns[:, 0]
        assert interval == bootstrap_interval(differences, seed=1).as_dict()
    (line,) = unseeing_lines(model, blind, beyond)  # rare: too few to say it
    mine, its = (100 * one["yes_no"]["accuracy"].value for one in (model, blind))
    assert line.startswith(
        f"warning: yes no questions: the model answers as if it did not see the image: {mine:.1f} % are "
        f"right, of the question-only baseline {its:.1f} %"
    )
    assert blind_accuracies(blind)["yes_no"] == pytest.approx(its / 100)
    none, all_right = measures(rare=np.zeros(20)), measures(rare=np.ones(20))
    lines = unseeing_lines(none, all_right, beyond_blind(none, all_right, seed=1))
    assert len(lines) == 2 and "rare questions" in lines[1]  # worse beyond chance
    few = measures(rare=np.arange(30) % 3 == 0), measures(rare=np.arange(30) % 3 == 1)
    (line,) = unseeing_lines(*few, beyond_blind(*few, seed=1))
    assert line.endswith(", of few questions)")
    (first, *_) = unseeing_lines(blind, blind, beyond_blind(blind, blind, seed=1))
    assert first.startswith("warning: the model answers") and first.endswith("(difference +0.0 [+0.0, +0.0])")


@pytest.mark.slow
def test_a_run_says_that_its_model_does_not_look(tmp_path, capsys):
    folder = train(
        training_models.train_settings(
            *training_models.SMALL_RUN, "callbacks.samples=3", "logger=csv", f"output={tmp_path}",
            f"encoder.architecture={training_models.tiny_clip(tmp_path)}",
        )
    )  # fmt: skip
    results = json.loads((folder / RESULTS).read_text())
    overall, row = results["beyond_blind"]["overall"], results["accuracy"]["overall"]
    assert overall["mean"] == pytest.approx(row["validation"] - row["blind"], abs=1e-6)
    printed = " ".join(capsys.readouterr().out.split())
    assert "the model answers as if it did not see the image" in printed and overall["low"] <= 0
