"""The trainer's settings do what they say: averaged weights, torch.compile, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from support import training_models
from torch import nn

from clipmapper import cli
from clipmapper.commands import train_fit
from clipmapper.commands.train import train
from clipmapper.errors import UserError
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "data.validation_scenes=12",
    "data.held_out_scenes=8",
    "training.max_steps=4",
    "training.warmup_steps=1",
    "training.blind_steps=1",
    "trainer.val_check_interval=2",
    "callbacks.samples=3",
    "callbacks.pictures=0",
    "callbacks.methods=[weighted]",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def settings(architecture, tmp_path_factory):
    where = (f"encoder.architecture={architecture}", f"output={tmp_path_factory.mktemp('runs')}")
    return lambda *overrides: training_models.train_settings(*TINY_RUN, *where, *overrides)


def weights(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]


class Seen(Callback):
    """The weights behind every step, and those that are validated and explained."""

    def __init__(self) -> None:
        self.steps, self.validated, self.explained = [], [], []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.steps.append(copy_of(module))

    def on_validation_batch_start(self, trainer, module, *_) -> None:
        self.validated.append(copy_of(module))

    def on_validation_end(self, trainer, module) -> None:
        self.explained.append(copy_of(module))


def copy_of(module: nn.Module) -> dict:
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


@pytest.fixture
def compiled(monkeypatch):
    """Collects what is to be compiled without doing it: torch.compile would come upon the checks of shapes
    that tests put in."""
    parts = []
    monkeypatch.setattr(nn.Module, "compile", lambda part: parts.append(part))
    return parts


@pytest.mark.slow
def test_averaged_weights_are_validated_explained_and_kept(settings, compiled, monkeypatch):
    seen = Seen()
    original = train_fit.build_trainer
    monkeypatch.setattr(train_fit, "build_trainer", lambda *args: original(*args[:-1], [*args[-1], seen]))
    folder = train(settings("name=ema", "trainer.ema_decay=0.5"))
    average, averages = None, []
    for step in seen.steps:
        previous = average or step
        average = {name: torch.lerp(step[name], previous[name], 0.5) for name in step}
        averages.append(average)
    # AveragedModel begins with the first step's weights; both validations see the averages of their step.
    for found in (seen.validated[0], seen.explained[0]):
        torch.testing.assert_close(found, averages[1])
    # Explained at last are those of the better one.
    best = json.loads((folder / RESULTS).read_text())["best"]["step"]
    torch.testing.assert_close(seen.explained[-1], averages[best - 1])
    torch.testing.assert_close(weights(folder), averages[3])
    trained = "model.head.layers.0.weight"
    assert not torch.equal(averages[3][trained], seen.steps[3][trained])
    frozen = "model.encoder.clip.visual.conv1.weight"
    assert torch.equal(weights(folder)[frozen], seen.steps[0][frozen])
    assert compiled == []  # trainer.compile is false


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trained_is_compiled(architecture, compiled, frozen):
    """Only that it is asked for; a run whose parts are traced is in test_processes.py."""
    model = training_models.tiny_model(architecture, frozen=frozen)
    VQAModule(model, 1e-3, 0.0, 1, 2, ["other"]).compile_trained()
    kinds = {type(part).__name__ for part in compiled}
    assert kinds == {"DualFlowBlock", "VQAHead"} | (set() if frozen else {"ResidualAttentionBlock"})


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("trainer.strategy=fsdp2",), "callbacks: sharded weights cannot be explained"),
        (
            ("trainer.strategy=fsdp2", "callbacks=none", "trainer.ema_decay=0.9"),
            "trainer.ema_decay: sharded weights cannot be averaged",
        ),
        (("encoder.lora_rank=2",), "encoder.lora_rank: a frozen encoder trains nothing"),
        (("encoder.trained_blocks=2",), "encoder.trained_blocks: a frozen encoder trains nothing"),
        (
            ("encoder.frozen=false", "encoder.lora_rank=2", "trainer.ema_decay=0.9"),
            "trainer.ema_decay: averages adapters' factors",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, overrides, line):
    with pytest.raises(UserError) as caught:
        settings(*overrides)
    assert str(caught.value).startswith(line)


def test_sweep_of_runs_with_several_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as leaving:
        cli.train(["--multirun", "seed=1,2", "trainer.devices=2", "callbacks=none"])
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --multirun with 2 processes a run: ")
