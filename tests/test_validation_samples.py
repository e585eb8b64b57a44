"""``training.validation_samples``: a fixed part of each validation split is scored."""

import json

import numpy as np
import pytest
from support import training_models
from support.photographs import photographs_in, run

from clipmapper.data.world.data import ScenesCaptions
from clipmapper.errors import UserError
from clipmapper.training.run_folder import RESULTS
from clipmapper.training.task import ValidationSubset


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("mine"))


def test_a_part_is_drawn_by_seed_and_name_and_all_is_the_split_itself():
    split = training_models.small_scenes().validation

    def questions(records):
        return [record.truth.question for record in records]

    assert ValidationSubset(None, 0).of("validation", split) is split
    assert not ValidationSubset(None, 0).lines()
    drawn = ValidationSubset(5, 0)
    part = drawn.of("validation", split)
    again = ValidationSubset(5, 0).of("validation", split)
    assert questions(part) == questions(again) and len(part) == 5
    places = [questions(split).index(question) for question in questions(part)]
    assert all(split[place].image is record.image for place, record in zip(places, part, strict=True))
    assert [split[place].image_id for place in places] == [record.image_id for record in part]
    assert places == sorted(places)
    assert questions(ValidationSubset(5, 1).of("validation", split)) != questions(part)
    assert questions(drawn.of("held_out", split)) != questions(part)
    assert drawn.numbers()["validation"] == {"samples": 5, "of": len(split)}
    assert (
        drawn.lines()[0] == f"validation: 5 of {len(split)} samples are scored (training.validation_samples)"
    )
    assert ValidationSubset(len(split), 0).of("validation", split) is split


def test_of_captions_images_and_truth_stay_together():
    split = ScenesCaptions(2, 2, 12, 2, references=2, seed=0).validation
    places = np.array([1, 7, 8])
    part = split.take(places)
    for number, place_ in enumerate(places.tolist()):
        assert (part[number].image.pixels == split[place_].image.pixels).all()
        assert part[number].truth.scene is split[place_].truth.scene
        assert (part[number].truth.instances == split[place_].truth.instances).all()
        assert part[number].captions == split[place_].captions


@pytest.mark.parametrize("task", ["questions", "captions"])
def test_the_results_say_how_many_of_how_many(place, task, capsys):
    settings = {
        "questions": ("data=manifest", "model.head_width=16", "training.blind_steps=1"),
        "captions": ("experiment=caption_manifest",),
    }[task]
    width = 16 if task == "questions" else 32
    more = (f"model.width={width}", "model.depth=1", "data.workers=0", "callbacks=none")
    path = f"data.path={place / f'{task}.jsonl'}"
    folder = run(place, *settings, path, *more, "training.validation_samples=2")
    results = json.loads((folder / RESULTS).read_text())
    assert results["validated"] == {"validation": {"samples": 2, "of": 3}}
    assert capsys.readouterr().out.count("validation: 2 of 3 samples are scored") == 2
    if task == "questions":
        assert results["accuracy"]["overall"]["questions"] == 2
        answers = json.loads((folder / "answers_validation.json").read_text())
    else:
        assert results["captions"]["validation"]["greedy"] == {"captions": 2}
        answers = json.loads((folder / "captions_validation.json").read_text())
    assert len(answers) == 2


def test_none_at_all_is_refused():
    with pytest.raises(UserError, match="validation_samples"):
        training_models.train_settings("training.validation_samples=0")
