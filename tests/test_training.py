"""Training: the optimiser, the loss, the metrics, both mappers, interruption, and what a checkpoint holds."""

import math
import os
import signal
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import training_models
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from training_models import same_bits

import clipmapper
from clipmapper.errors import UserError
from clipmapper.models.build import build_clipmapper
from clipmapper.training import run
from clipmapper.training.blind import blind_accuracy
from clipmapper.training.interruption import RunInterrupted
from clipmapper.training.optimisation import adamw, warmup_cosine
from clipmapper.training.run import VALIDATION_SPLITS, Labelled, train
from clipmapper.training.run_folder import CHECKPOINT, RESULTS
from clipmapper.training.scene_batches import scene_splits
from clipmapper.training.vqa import StepBatches, VQAModule, answer_loss

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "training.max_steps=7",
    "training.warmup_steps=3",
    "training.blind_steps=1",
    "callbacks.samples=4",
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
    """``settings(*overrides)``: of a training run of a second, with runs in a folder of this module."""
    output = tmp_path_factory.mktemp("runs")

    def with_overrides(*overrides: str):
        where = (f"encoder.architecture={architecture}", f"output={output}")
        return training_models.train_settings(*TINY_RUN, *where, *overrides)

    return with_overrides


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def state_of_training(folder: Path) -> dict:
    """Everything in a checkpoint that later steps depend on."""
    return {key: checkpoint(folder)[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}


# The optimiser


def test_decay_is_for_matrices_only(architecture):
    model = training_models.tiny_model(architecture, frozen=False)
    groups = adamw(model, 1e-3, 0.3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    kinds = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = isinstance(module, nn.LayerNorm) or name.endswith("bias") or parameter.ndim < 2
            assert decay[id(parameter)] == (0.0 if plain else 0.3)
            kinds.add((type(module).__name__, name))
    assert {("LayerNorm", "weight"), ("Linear", "bias"), ("MultiheadAttention", "in_proj_bias")} <= kinds
    assert {("Linear", "weight"), ("Embedding", "weight"), ("Conv2d", "weight")} <= kinds


def test_frozen_weights_are_not_the_optimiser_s(architecture):
    model = training_models.tiny_model(architecture, frozen=True)
    held = {id(p) for group in adamw(model, 1e-3, 0.3).param_groups for p in group["params"]}
    assert held == {id(p) for part in (model.mapper, model.head) for p in part.parameters()}


def learning_rates(warmup: int, total: int, steps: int) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule = warmup_cosine(optimiser, warmup, total)
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return seen


def test_learning_rate_by_hand():
    quarter = 4 + 4 * math.sqrt(0.5)  # a quarter of the half cosine from 8 to 0
    expected = [2, 4, 6, 8, 8, quarter, 4, 8 - quarter, 0, 0]
    assert learning_rates(4, 8, 10) == pytest.approx(expected)
    assert learning_rates(0, 2, 3) == pytest.approx([8, 4, 0])


def test_loss_is_the_naive_formula():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    targets = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for row in range(3):
        for answer in range(5):
            p = 1 / (1 + math.exp(-logits[row, answer]))
            t = float(targets[row, answer])
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert float(answer_loss(logits, targets)) == pytest.approx(total / 3, rel=1e-12)


# Both mappers


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.values.append(float(outputs["loss"]))


class Fitted:
    """A model that was trained on 40 questions until it knew most of them, and how."""

    def __init__(self, architecture: str, mapper: str, folder: Path) -> None:
        data = training_models.small_scenes()
        self.model = training_models.tiny_model(
            architecture, mapper=mapper, width=32, depth=2, head_width=32
        )
        self.splits = scene_splits(self.model, data, cached=True)
        self.module = VQAModule(self.model, 1e-2, 0.0, 5, 80, data.families, VALIDATION_SPLITS)
        losses = Losses()
        self.trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=80,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[losses],
        )
        few = torch.arange(40)
        batches = DataLoader(StepBatches(lambda step: self.splits["train"].batch(few), 0, 80), batch_size=None)
        with run._less_noise():
            self.trainer.fit(self.module, batches)
        self.losses = losses.values
        self.checkpoint = folder / f"{mapper}.ckpt"
        self.trainer.save_checkpoint(self.checkpoint)


@pytest.fixture(scope="module", params=["dual_flow", "single_flow"])
def fitted(request, architecture, tmp_path_factory):
    return Fitted(architecture, request.param, tmp_path_factory.mktemp("fitted"))


def test_mapper_learns_a_few_questions_by_heart(fitted):
    assert len(fitted.losses) == 80
    assert fitted.losses[-1] < 0.25 * fitted.losses[4]
    batch = fitted.splits["train"].batch(torch.arange(40))
    with torch.no_grad():
        found = fitted.module.logits(batch).argmax(dim=1)
    assert (found == batch["targets"].argmax(dim=1)).float().mean() > 0.8


# Metrics


def test_validation_accuracy_is_a_count_by_hand(fitted):
    loaders = [DataLoader(Labelled(fitted.splits[name]), batch_size=None) for name in VALIDATION_SPLITS]
    with run._less_noise():
        fitted.trainer.validate(fitted.module, loaders, verbose=False)
    logged = fitted.trainer.callback_metrics
    for name in VALIDATION_SPLITS:
        split = fitted.splits[name].split
        counted = {}
        for number, question in enumerate(split.questions):
            with torch.no_grad():
                logits = fitted.module.logits(fitted.splits[name].batch(torch.tensor([number])))
            right = fitted.model.answers[int(logits.argmax())] == question.answer
            counted.setdefault(question.family, []).append(right)
            counted.setdefault("overall", []).append(right)
        assert set(counted) == {*fitted.module.soft_accuracy[name]._names}
        for family, hits in counted.items():
            assert float(logged[f"{name}/accuracy/{family}"]) == pytest.approx(np.mean(hits)), family
        assert float(logged[f"{name}/top1"]) == pytest.approx(np.mean(counted["overall"]))
        assert 0 < np.mean(counted["overall"]) < 1


@pytest.mark.parametrize("cached", [True, False])
def test_blind_baseline_sees_no_image(architecture, cached):
    data = training_models.small_scenes()
    model = training_models.tiny_model(architecture)
    splits = scene_splits(model, data, cached, names=("train", "validation"))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def accuracy() -> dict:
        torch.manual_seed(int(torch.randint(1000, (1,))))  # its own seed is all it depends on
        return blind_accuracy(
            model,
            training_models.TINY_MAPPER,
            splits["train"],
            splits["validation"],
            steps=20,
            batch_size=16,
            learning_rate=1e-2,
            weight_decay=0.0,
            seed=5,
        )

    first = accuracy()
    for split in splits.values():
        if cached:
            split.cache.image_tokens.fill_(torch.nan)
        else:
            split.split = type(split.split)(
                np.zeros((0, 72, 72, 3), dtype=np.uint8),
                split.split.questions,
                split.split.image_of,
                split.split.instances,
            )
    assert accuracy() == first
    assert set(first) == {*data.families, "overall"} and 0 < first["overall"] < 1
    asked = [q.family for q in data.validation.questions]
    mean = sum(first[family] * asked.count(family) for family in data.families) / len(asked)
    assert first["overall"] == pytest.approx(mean)
    assert same_bits(before, dict(model.state_dict()))


# Whole runs


@pytest.fixture(scope="module")
def whole_run(settings):
    """An uninterrupted run with each way of training: ``whole_run(*overrides)``, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run_of(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = train(settings(f"name=whole{len(made)}", *overrides))
        return made[overrides]

    return run_of


CACHED = ("callbacks=relevance", "trainer.val_check_interval=3", "callbacks.pictures=0", *TINY_RUN[-7:-6])
TUNED = ("callbacks=none", "encoder.frozen=false", "model.mapper=single_flow")


def interrupt_in_step(step: int, monkeypatch, action) -> None:
    """``action`` happens in the middle of that step (counted from 0), before its gradients."""
    original = VQAModule.training_step

    def training_step(module, batch, index):
        if module.global_step == step:
            action()
        return original(module, batch, index)

    monkeypatch.setattr(VQAModule, "training_step", training_step)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("way", "step"), [(CACHED, 2), (TUNED, 4)], ids=["frozen, before a validation", "tuned"]
)
def test_interrupted_and_resumed_is_as_if_never_interrupted(settings, whole_run, monkeypatch, way, step):
    whole = whole_run(*way)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        interrupt_in_step(step, patched, ctrl_c)
        with pytest.raises(RunInterrupted, match=f"after step {step + 1}"):
            train(settings("name=stopped", *way))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    folder = train(settings("name=stopped", "resume=true", *way))
    assert checkpoint(folder)["global_step"] == 7
    assert same_bits(state_of_training(folder), state_of_training(whole))
    assert len(list(folder.parent.iterdir())) == 1
    accuracies = [yaml.safe_load((path / RESULTS).read_text())["accuracy"] for path in (folder, whole)]
    assert accuracies[0] == accuracies[1]
