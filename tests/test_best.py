"""The weights of the best validation: which they are, that they are kept, and what a crash leaves of them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from support import training_models
from support.photographs import SETTINGS, photographs_in
from support.slow import mostly_slow
from support.training_models import same_bits

import clipmapper
from clipmapper.commands.train import train
from clipmapper.errors import UserError
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.best import KeepBest, better
from clipmapper.training.checkpoint import previous_of
from clipmapper.training.run_folder import BEST, CHECKPOINT, RESULTS

# Of five validations, as if they had come out so.
MADE_UP = "trainer.monitor=validation/made_up"
SCORES = {1: 0.4, 2: 0.6, 3: 0.5, 4: 0.6, 5: 0.2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def settings(place, tmp_path):
    architecture = training_models.tiny_clip(place)
    common = [one for one in SETTINGS if "callbacks." not in one]
    given = (
        *common, "data=manifest", f"data.path={place / 'questions.jsonl'}", "training.max_steps=5",
        "trainer.val_check_interval=1", "trainer.checkpoint_interval=2", "training.blind_steps=0",
        "training.learning_rate=0.01", "callbacks=none", f"encoder.architecture={architecture}",
        f"output={tmp_path}", "data.workers=0",
    )  # fmt: skip
    return lambda *more: training_models.train_settings(*given, *more)


@pytest.fixture
def scored(monkeypatch):
    """Validations come out as :data:`SCORES` says; the weights of each step are noted."""
    seen = {}
    original = VQAModule.on_validation_epoch_end

    def on_validation_epoch_end(module):
        original(module)
        step = module.global_step
        module.log("validation/made_up", SCORES[step])
        seen.setdefault(step, {name: weight.clone() for name, weight in module.state_dict().items()})

    monkeypatch.setattr(VQAModule, "on_validation_epoch_end", on_validation_epoch_end)
    return seen


def kept(folder) -> dict:
    return torch.load(folder / BEST, weights_only=True)


def results(folder) -> dict:
    return json.loads((folder / RESULTS).read_text())


def test_the_first_of_the_best_is_kept_and_its_numbers_are_the_results(place, settings, scored):
    folder = train(settings(MADE_UP))
    best = results(folder)["best"]
    assert (best["step"], best["value"], best["stopped_early"]) == (2, pytest.approx(0.6), False)
    assert best["validations"] == [[step, pytest.approx(score)] for step, score in SCORES.items()]
    assert kept(folder)["global_step"] == 2 and same_bits(kept(folder)["state_dict"], scored[2])
    last = torch.load(folder / CHECKPOINT, weights_only=True)
    assert last["global_step"] == 5 and same_bits(last["state_dict"], scored[5])
    assert results(folder)["files"]["checkpoint"] == str(folder / BEST)
    assert not previous_of(folder / BEST).exists()
    # What the model of that step answers, by the file of answers.
    model = clipmapper.load(folder / BEST)
    written = json.loads((folder / "answers_validation.json").read_text())
    rows = map(json.loads, (place / "questions.jsonl").read_text().splitlines())
    asked = [row for row in rows if row["split"] == "validation"]
    for row, answer in zip(asked, written, strict=True):
        assert model.answer(place / row["image"], row["question"]) == answer["answer"]


@pytest.mark.slow
def test_the_lowest_loss_is_the_best(settings, capsys):
    folder = train(settings("trainer.monitor=validation/loss"))
    best = results(folder)["best"]
    losses = dict(map(tuple, best["validations"]))
    assert len(losses) == 5 and best["value"] == min(losses.values()) == losses[best["step"]]
    assert f"of step {best['step']}" in capsys.readouterr().out
    assert train(settings("trainer.monitor=validation/loss", "trainer.mode=max", "name=other"))
    other = results(next(folder.parents[1].glob("other/*")))["best"]
    assert other["value"] == max(losses.values())


def test_patience_ends_the_run(settings, scored):
    folder = train(settings(MADE_UP, "trainer.patience=2"))
    best = results(folder)["best"]
    assert (best["step"], best["stopped_early"], len(best["validations"])) == (2, True, 4)
    assert torch.load(folder / CHECKPOINT, weights_only=True)["global_step"] == 4


def test_a_score_that_is_not_logged_is_a_line(settings):
    with pytest.raises(UserError, match=r"trainer\.monitor=accuracy: .*validation/accuracy/overall"):
        train(settings("trainer.monitor=accuracy"))


class Killed(BaseException):
    pass


MOMENTS = (
    "before the best is saved",
    "behind the best",
    "in the last validation",
    "when the best is put back",
)


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS, MOMENTS[:1]))
def test_a_run_that_was_killed_finds_the_same_best(settings, scored, monkeypatch, tmp_path, moment):
    whole = train(settings(MADE_UP, "name=whole"))
    config = settings(MADE_UP, "name=killed")
    save = KeepBest.save

    def killed_at(trainer) -> bool:
        step = {"in the last validation": 5}.get(moment, 2)
        return trainer.global_step == step

    def at_save(keep, trainer):
        if moment == "before the best is saved" and killed_at(trainer):
            raise Killed
        save(keep, trainer)
        if moment in ("behind the best", "in the last validation") and killed_at(trainer):
            raise Killed

    def at_put_back(*given):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(KeepBest, "save", at_save)
        if moment == "when the best is put back":
            patched.setattr(KeepBest, "put_back", at_put_back)
        with pytest.raises(Killed):
            train(config)
    done = train(replace(config, resume=True))
    assert results(done)["best"] == results(whole)["best"]
    for part in ("accuracy", "objective"):
        assert results(done)[part] == results(whole)[part]
    assert same_bits(kept(done)["state_dict"], kept(whole)["state_dict"])
    assert (done / "answers_validation.json").read_text() == (whole / "answers_validation.json").read_text()


@pytest.mark.slow
def test_averaged_weights_are_what_is_kept(settings, scored):
    """As they were validated, while the run goes on with the others."""
    folder = train(settings(MADE_UP, "trainer.ema_decay=0.5"))
    assert same_bits(kept(folder)["state_dict"], scored[2])
    assert same_bits(torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"], scored[5])


def test_a_later_file_than_the_run_knows_of_gives_way_to_the_one_before(settings, scored, tmp_path):
    folder = train(settings(MADE_UP))
    keep = KeepBest(tmp_path / "best.ckpt", "x", "max", None)
    shutil.copy(folder / CHECKPOINT, keep.path)  # of step 5
    shutil.copy(folder / BEST, previous_of(keep.path))  # of step 2
    keep.load_state_dict({"validations": [[2, 0.6]], "best": [2, 0.6]})
    assert torch.load(keep.path, weights_only=True)["global_step"] == 2 and keep.best == [2, 0.6]
    keep.path.unlink()
    keep.load_state_dict({"validations": [[2, 0.6]], "best": [2, 0.6]})
    assert keep.best is None  # lost: the next one is kept


def test_no_number_is_no_best():
    nan = float("nan")
    assert better(1.0, nan, "min") and not better(nan, 1.0, "max") and not better(nan, nan, "min")
    assert better(0.5, 1.0, "min") and better(1.0, 0.5, "max") and not better(1.0, 1.0, "max")
