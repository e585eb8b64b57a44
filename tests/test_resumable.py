"""A checkpoint that says something else of optimiser and loops than its run would have is one line."""

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import training_models
from support.slow import mostly_slow

from clipmapper.commands.train import train
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.run_folder import CHECKPOINT

SETTINGS = (
    *training_models.SMALL_RUN,
    "data.train_scenes=24", "data.simple_scenes=16", "training.max_steps=4", "training.blind_steps=1",
    "callbacks=none", "logger=csv", "model.width=16", "model.depth=1", "model.heads=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The settings of a run that was stopped behind its second step, and its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    where = (f"encoder.architecture={training_models.tiny_clip(folder)}", f"output={folder}", "name=stopped")
    config = training_models.train_settings(*SETTINGS, *where)
    original = VQAModule.training_step

    def training_step(module, batch, index):
        if module.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(module, batch, index)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(VQAModule, "training_step", training_step)
        with pytest.raises(RunInterrupted, match="after step 2"):
            train(config)
    (run,) = Path(folder, "stopped").iterdir()
    return replace(config, resume=True), run / CHECKPOINT


def set_at(keys, value):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return change


def taken(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


STATE = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)
SCHEDULE = ("lr_schedulers", 0)
CHANGES = {
    "no optimiser": (taken("optimizer_states"), "optimizer_states: missing"),
    "two optimisers": (set_at(("optimizer_states",), [{}, {}]), "not of one optimiser"),
    "no loops": (taken("loops"), "loops: missing"),
    "loops of text": (set_at(("loops",), "x"), "loops: not an object"),
    "other weights": (set_at((*GROUP, "params"), []), "param_groups.0.params: not a list"),
    "another decay": (set_at((*GROUP, "weight_decay"), 9.0), "param_groups.weight_decay: 9.0 in place of"),
    "a rate of text": (set_at((*GROUP, "lr"), "x"), "is not a number"),
    "a moment of another shape": (set_at((*STATE, "exp_avg"), torch.zeros(3)), "not a tensor of the shape"),
    "a moment that is not finite": (set_at((*STATE, "exp_avg_sq", ...), torch.nan), "numbers that can't be"),
    "no moment": (taken(*STATE, "exp_avg"), "exp_avg: missing"),
    "rates of another run": (set_at((*SCHEDULE, "base_lrs"), [1.0, 1.0]), "lr_schedulers"),
    "a schedule that is ahead": (set_at((*SCHEDULE, "last_epoch"), 1000), "1000 after 2 steps"),
    "steps that differ": (set_at(("global_step",), 3), "2 steps, elsewhere 3"),
    "another Lightning": (set_at(("pytorch-lightning_version",), "0.1"), "is not Lightning 2 or later"),
}


@pytest.mark.parametrize("what", mostly_slow(CHANGES, ["other weights"]))
def test_a_changed_part_is_named(stopped, what):
    config, path = stopped
    change, says = CHANGES[what]
    before = path.read_bytes()
    changed = copy.deepcopy(torch.load(path, weights_only=True))
    change(changed)
    torch.save(changed, path)
    try:
        with pytest.raises(UserError, match="it does not fit this run") as caught:
            train(config)
    finally:
        path.write_bytes(before)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_was_not_changed_goes_on(stopped):
    config, _ = stopped
    assert (train(config) / "results.json").is_file()
