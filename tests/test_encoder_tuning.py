"""The encoder while fine-tuning: steps in which it rests, a rate of its own, weights between before and
behind, and what becomes of the CLIP itself."""

import json
from pathlib import Path

import pytest
import torch
from support import training_models
from support.slow import mostly_slow
from support.training_models import same_bits
from torch import nn

import clipmapper
from clipmapper.commands import train_fit
from clipmapper.commands.train import train
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.models.encoder import learning_rate_scales
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.interpolation import Interpolation, between
from clipmapper.training.interruption import GracefulInterrupt
from clipmapper.training.module import adamw, warmup_cosine
from clipmapper.training.retrieval import ClipRetrieval, retrieved
from clipmapper.training.run_folder import BEST, CHECKPOINT, INTERPOLATED, RESULTS

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=16",
    "data.simple_scenes=8",
    "data.validation_scenes=8",
    "data.held_out_scenes=4",
    "training.max_steps=5",
    "training.warmup_steps=2",
    "training.blind_steps=0",
    "training.batch_size=8",
    "trainer.val_check_interval=2",
    "callbacks=none",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "encoder.frozen=false",
)
ENCODER = "model.encoder.clip."


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def settings(architecture, tmp_path):
    return training_models.settings_of_run(TINY_RUN, architecture, tmp_path)


@pytest.fixture
def steps(monkeypatch):
    """The weights behind every step, by step, and the norms that gradients were clipped by."""
    seen: dict[int, dict] = {}
    as_it_is = GracefulInterrupt.on_train_batch_end

    def noted(self, trainer, module, *others) -> None:
        seen[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}
        as_it_is(self, trainer, module, *others)

    monkeypatch.setattr(GracefulInterrupt, "on_train_batch_end", noted)
    return seen


def stop_behind(monkeypatch, step: int) -> None:
    as_it_is = GracefulInterrupt.on_train_batch_end

    def stopped(self, trainer, *others) -> None:
        self.interrupted = self.interrupted or trainer.global_step == step
        as_it_is(self, trainer, *others)

    monkeypatch.setattr(GracefulInterrupt, "on_train_batch_end", stopped)


def checkpoint(folder: Path, name: Path = CHECKPOINT) -> dict:
    return torch.load(folder / name, weights_only=True)


def changed(one: dict, other: dict) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


# Steps in which the encoder rests


def test_the_encoder_rests_at_first_and_then_learns(settings, steps):
    train(settings("encoder.frozen_steps=2", "trainer.val_check_interval=null"))
    resting = {name for name in changed(steps[1], steps[2]) if name.startswith(ENCODER)}
    assert not resting and "model.head.layers.0.weight" in changed(steps[1], steps[2])
    learning = {name for name in changed(steps[2], steps[3]) if name.startswith(ENCODER)}
    assert f"{ENCODER}visual.conv1.weight" in learning and f"{ENCODER}token_embedding.weight" in learning


@pytest.mark.parametrize(
    "more",
    mostly_slow(["", "trainer.ema_decay=0.5", "trainer.accumulate_grad_batches=2"], [""]),
)
def test_the_steps_at_rest_are_those_of_a_frozen_encoder(settings, steps, more):
    """But for rounding: attention in evaluation mode is computed another way."""
    clip = ("trainer.gradient_clip_val=0.01", "training.token_cache=false", "trainer.val_check_interval=null")
    more = (more,) if more else ()
    train(settings("name=resting", "encoder.frozen_steps=4", *clip, *more))
    resting = dict(steps)
    steps.clear()
    train(settings("name=frozen", "encoder.frozen=true", *clip, *more))
    unseen = ("key_value.bias", "in_proj_bias")  # by softmax: what Adam makes of rounding errors
    for step in range(1, 5):
        for name, weight in resting[step].items():
            if name.startswith(ENCODER):
                assert torch.equal(weight, steps[step][name]), (step, name)
            elif not name.endswith(unseen):
                torch.testing.assert_close(weight, steps[step][name], atol=1e-4, rtol=1e-3)
    assert any(not torch.equal(w, steps[5][n]) for n, w in resting[5].items() if n.startswith(ENCODER))


@pytest.mark.parametrize("stopped", mostly_slow([1, 2, 3], [2]))
@pytest.mark.slow
def test_a_run_that_is_stopped_while_the_encoder_rests_goes_on_the_same(settings, monkeypatch, stopped):
    rests = ("encoder.frozen_steps=2", "encoder.learning_rate=1e-4", "encoder.interpolation=[0.5]")
    whole = train(settings("name=whole", *rests))
    with monkeypatch.context() as patched:
        stop_behind(patched, stopped)
        with pytest.raises(RunInterrupted):
            train(settings("name=stopped", *rests))
    again = train(settings("name=stopped", "resume=true", *rests))
    one, other = checkpoint(whole), checkpoint(again)
    found = [json.loads((folder / RESULTS).read_text()) for folder in (whole, again)]
    for part in ("clip", "interpolation", "accuracy"):
        assert found[0][part] == found[1][part], part
    assert same_bits(one["state_dict"], other["state_dict"])
    assert same_bits(one["optimizer_states"], other["optimizer_states"])
    assert same_bits(checkpoint(whole, INTERPOLATED), checkpoint(again, INTERPOLATED))


def test_the_encoder_is_trained_in_training_mode(settings, monkeypatch):
    """Also by a run that is resumed, which asks nothing of the CLIP before."""
    modes = []
    as_it_is = GracefulInterrupt.on_train_batch_start

    def noted(self, trainer, module, *others) -> None:
        encoder = module.model.encoder
        modes.append({part.training for part in encoder.modules()} | {module.model.mapper.training})
        as_it_is(self, trainer, module, *others)

    monkeypatch.setattr(GracefulInterrupt, "on_train_batch_start", noted)
    with monkeypatch.context() as patched:
        stop_behind(patched, 3)
        with pytest.raises(RunInterrupted):
            train(settings())
    train(settings("resume=true"))
    assert modes == [{True}] * 5


@pytest.mark.slow
def test_explanations_have_the_gradients_of_an_encoder_that_rests(settings):
    """As if it did not: it rests in training steps alone."""
    explained = ("callbacks=relevance", "callbacks.methods=[weighted,gae]", "callbacks.samples=2")
    folder = train(settings("encoder.frozen_steps=4", *explained, "callbacks.pictures=0"))
    assert json.loads((folder / RESULTS).read_text())["explanations"]


def test_words_that_do_not_pass_the_tower_have_no_gradient(architecture):
    module = VQAModule(training_models.tiny_model(architecture, frozen=False), 1e-3, 0.0, 1, 2, ["other"])
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    module.model.encoder.resting = True
    module.on_before_optimizer_step(adamw(module.model, 1e-3, 0.0))
    assert all(weight.grad is None for weight in module.model.encoder.parameters())
    assert all(weight.grad is not None for weight in module.model.mapper.parameters())


def test_rate_of_its_own_and_a_warm_up_behind_the_rest(architecture):
    model = training_models.tiny_model(architecture, frozen=False)
    encoder = set(model.encoder.parameters())
    scales = learning_rate_scales(model.encoder, 0.5, 0.01)
    optimiser = adamw(model, 0.1, 0.3, scales=scales, later=encoder, begins=10)
    schedule = warmup_cosine(optimiser, 4, 100)

    def rates() -> tuple[float, float]:
        """Of the norm behind the blocks, and of the head."""
        rate = {id(weight): group["lr"] for group in optimiser.param_groups for weight in group["params"]}
        return rate[id(model.encoder.clip.ln_final.weight)], rate[id(model.head.layers[0].weight)]

    of_all = []
    for _ in range(20):
        of_all.append(rates())
        optimiser.step()
        schedule.step()
    own, others = zip(*of_all, strict=True)
    assert set(own[:10]) == {0.0}
    for step in (10, 11, 12, 13):
        assert own[step] == pytest.approx(0.01 * others[step] * (step - 9) / 4)
    assert own[15] == pytest.approx(0.01 * others[15])
    plain = warmup_cosine(adamw(nn.Linear(2, 2), 0.1, 0.3), 4, 100)
    for step, rate in enumerate(others):  # the others are as without
        assert plain.get_last_lr() == [rate, rate], step
        plain.optimizer.step()
        plain.step()
    # What checkpoints of runs hold that were begun before: resuming compares it.
    assert set(plain.optimizer.param_groups[0]) & {"begins"} == set()
    assert plain.state_dict()["lr_lambdas"] == [None, None]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("encoder.frozen=true", "encoder.frozen_steps=2"),
            "encoder.frozen_steps: a frozen",
        ),
        (
            ("encoder.frozen=true", "encoder.learning_rate=1"),
            "encoder.learning_rate: a frozen",
        ),
        (
            ("encoder.frozen=true", "encoder.interpolation=[1]"),
            "encoder.interpolation: a frozen",
        ),
        (("encoder.interpolation=[]",), "encoder.interpolation: is an empty list"),
        (("encoder.interpolation=[0.5,0.5]",), "encoder.interpolation: 0.5 is listed twice"),
        (("encoder.interpolation=[1.5]",), "encoder.interpolation: 1.5 is more than 1"),
        (("encoder.frozen_steps=5",), "encoder.frozen_steps=5: training ends behind 5 steps"),
    ],
)
def test_settings_that_do_not_go_together(settings, overrides, line):
    with pytest.raises(UserError) as caught:
        train(settings(*overrides))
    assert str(caught.value).startswith(line)


# Weights between


def scored(monkeypatch, scores: dict[float, float], keep: list) -> None:
    """Let the weights between have these accuracies: by how far the encoder's are from those of before."""
    original = Interpolation.choose

    def choose(self, trainer, module, kept, validate, interpolated):
        tried = iter(self.weights)

        def validated() -> None:
            validate()
            trainer.callback_metrics[self.monitor] = torch.tensor(scores[next(tried)])

        keep.append(torch.load(self.before, weights_only=True))
        return original(self, trainer, module, kept, validated, interpolated)

    monkeypatch.setattr(Interpolation, "choose", choose)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0: 0.1, 0.5: 0.9, 1: 0.9}, 0.5),  # of equal ones the nearest to before
        *mostly_slow([({0: 0.1, 0.5: 0.5, 1: 0.9}, 1), ({0: float("nan"), 0.5: 0.5, 1: 0.2}, 0.5)], []),
    ],
)
def test_the_best_between_is_what_results_name(settings, monkeypatch, capsys, scores, best):
    before: list[dict] = []
    scored(monkeypatch, scores, before)
    folder = train(settings("encoder.interpolation=[0.5,0,1]", "training.learning_rate=0.01"))
    results = json.loads((folder / RESULTS).read_text())
    told = results["interpolation"]
    assert told["weight"] == best and [weight for weight, _ in told["tried"]] == [0, 0.5, 1]
    assert "encoder between before (0) and behind training (1)" in " ".join(capsys.readouterr().out.split())
    trained = checkpoint(folder, BEST)["state_dict"]
    named = torch.load(results["files"]["checkpoint"], weights_only=True)["state_dict"]
    assert Path(results["files"]["checkpoint"]) == folder / (BEST if best == 1 else INTERPOLATED)
    for name, weight in trained.items():
        old = before[0].get(name.removeprefix(ENCODER), weight) if name.startswith(ENCODER) else weight
        torch.testing.assert_close(named[name], (1 - best) * old + best * weight)
    assert changed(trained, named) or best == 1
    model = clipmapper.load(results["files"]["checkpoint"])  # and it scores what the results say
    validated = json.loads((folder / "answers_validation.json").read_text())
    assert len(validated) and model.answer(training_models.picture(0), "is there a ring?") in model.answers


def test_both_ends_are_exact_and_adapters_are_interpolated_as_what_they_add():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base, a, b, b0 = drawn(4, 4), drawn(2, 4), drawn(4, 2), torch.zeros(4, 2)
    names = ("c_fc.base_layer.weight", "c_fc.lora_A.default.weight", "c_fc.lora_B.default.weight")
    before = dict(zip(names, (base, drawn(2, 4), b0), strict=True))
    trained = {ENCODER + n: w for n, w in zip(names, (base, a, b), strict=True)} | {"model.head": drawn(3)}
    found = between(before, trained, 0.25)
    w, a1, b1 = (found[ENCODER + name] for name in names)
    torch.testing.assert_close(w + b1 @ a1, base + 0.25 * (b @ a))
    assert torch.equal(found["model.head"], trained["model.head"])
    assert same_bits(between(before, trained, 1.0), trained)
    assert torch.equal(between(before, trained, 0.0)[ENCODER + names[2]], b0)


@pytest.mark.slow
def test_averages_do_not_come_back_when_other_weights_are_put_in(settings, monkeypatch):
    """Lightning's averaging swaps its own weights in for every validation."""
    seen = []

    class Seen(train_fit.KeepBest):
        def on_validation_end(self, trainer, module) -> None:
            if self.over:
                seen.append({name: weight.clone() for name, weight in module.state_dict().items()})
            super().on_validation_end(trainer, module)

    monkeypatch.setattr(train_fit, "KeepBest", Seen)
    ema = ("trainer.ema_decay=0.5", "training.learning_rate=0.01", "encoder.interpolation=[0]")
    folder = train(settings(*ema))
    named = checkpoint(folder, INTERPOLATED)["state_dict"]
    assert len(seen) == 2 and all(same_bits(one, named) for one in seen)


# The CLIP itself


def test_retrieval_by_hand():
    own = torch.tensor([[True, True, False], [False, False, True], [False, True, False]])
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.4, 0.4]])
    found = retrieved(similarity, own)
    # Image 0 finds its text 1 first; image 1 finds text 0; of image 2 an equal text comes first.
    assert found["image_to_text_top1"] == pytest.approx(1 / 3)
    # Text 0: image 1 is nearer than its own; text 1: image 0 is its own; text 2: image 1 is.
    assert found["text_to_image_top1"] == pytest.approx(2 / 3)
    assert found["image_to_text_top5"] == found["text_to_image_top5"] == 1
    assert retrieved(torch.zeros(6, 6), torch.eye(6, dtype=torch.bool))["image_to_text_top5"] == 0


@pytest.mark.slow
def test_what_became_of_the_clip_is_said_and_disturbs_nothing(settings, architecture, monkeypatch, capsys):
    folder = train(settings("name=told", "training.learning_rate=0.05"))
    results = json.loads((folder / RESULTS).read_text())["clip"]
    assert results["images"] == 8 and results["questions"] > 8
    assert results["before"].keys() == results["after"].keys() and results["before"] != results["after"]
    assert "the CLIP itself, 8 validation images and their" in capsys.readouterr().out
    monkeypatch.setattr(ClipRetrieval, "before", lambda *_: None)
    monkeypatch.setattr(ClipRetrieval, "scores", lambda *_: results["after"])
    quiet = train(settings("name=quiet", "training.learning_rate=0.05"))
    assert same_bits(checkpoint(folder)["state_dict"], checkpoint(quiet)["state_dict"])
    told = json.loads((quiet / RESULTS).read_text())["clip"]
    assert told["before"] is None


def test_scores_leave_random_state_and_modes(architecture, tmp_path):
    encoder = training_models.tiny_model(architecture, frozen=False).encoder.train()
    clip = ClipRetrieval(training_models.small_scenes(), 0, tmp_path)
    before = torch.get_rng_state()
    one, other = clip.scores(encoder), clip.scores(encoder)
    assert one == other and encoder.training and torch.equal(before, torch.get_rng_state())
    assert all(0 <= share <= 1 for share in one.values())
    assert clip.pool.own.any(0).all() and clip.pool.own.any(1).all()
