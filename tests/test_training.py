"""Training: the optimiser, the loss, the metrics, both mappers, interruption, and what a checkpoint holds."""

import json
import math
import os
import pickle
import signal
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from support import training_models
from support.slow import mostly_slow
from support.training_models import same_bits
from torch import nn
from torch.utils.data import DataLoader

import clipmapper
from clipmapper.commands.train import train
from clipmapper.data.records import RecordDataset
from clipmapper.data.tables.base import RecordList
from clipmapper.data.token_cache import TokenStore
from clipmapper.data.world.data import RenderedImage
from clipmapper.data.world.questions import ANSWERS, SceneQuestion
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.explanation_scores import curves as explanation_curves
from clipmapper.tasks.vqa import task as vqa_run
from clipmapper.tasks.vqa.batches import QuestionBatches
from clipmapper.tasks.vqa.blind import blind_answers
from clipmapper.tasks.vqa.model import build_clipmapper
from clipmapper.tasks.vqa.training import VQAModule, answer_loss
from clipmapper.training.batches import Labelled, StepBatches
from clipmapper.training.launching import less_noise
from clipmapper.training.module import adamw, warmup_cosine
from clipmapper.training.run_folder import CHECKPOINT, RESULTS, folder_to_resume, new_run_folder

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "training.max_steps=7",
    "training.warmup_steps=3",
    "training.blind_steps=1",
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


def question_splits(model, data, names, store) -> dict[str, QuestionBatches]:
    return {name: QuestionBatches(model, data, name, data.splits[name], store) for name in names}


class Fitted:
    """A model that was trained on 40 questions until it knew most of them, and how."""

    def __init__(self, mapper: str, folder: Path) -> None:
        data = training_models.small_scenes()
        architecture = training_models.tiny_clip(folder)
        self.model = training_models.tiny_model(architecture, mapper=mapper, width=32, depth=2, head_width=32)
        self.splits = question_splits(
            self.model, data, ("simple", "train", *data.validation_splits), TokenStore()
        )
        self.module = VQAModule(self.model, 1e-2, 0.0, 5, 80, data.families, data.validation_splits)
        losses = Losses()
        self.trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=80,
            val_check_interval=80,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[losses],
        )
        few = torch.arange(40)
        batches = StepBatches(lambda step, share: self.splits["train"].batch(few), 0, 80)
        validation = [Labelled(self.splits[name]) for name in data.validation_splits]
        loaders = [DataLoader(dataset, batch_size=None) for dataset in (batches, *validation)]
        with less_noise():
            self.trainer.fit(self.module, loaders[0], loaders[1:])
        self.losses = losses.values
        self.checkpoint = folder / f"{mapper}.ckpt"
        self.trainer.save_checkpoint(self.checkpoint)
        Path(architecture).unlink()


@pytest.fixture(scope="module", params=["dual_flow", "single_flow"])
def fitted(request, tmp_path_factory):
    return Fitted(request.param, tmp_path_factory.mktemp("fitted"))


def test_mapper_learns_a_few_questions_by_heart(fitted):
    assert len(fitted.losses) == 80
    assert fitted.losses[-1] < 0.25 * fitted.losses[4]
    batch = fitted.splits["train"].batch(torch.arange(40))
    with torch.no_grad():
        found = fitted.module.logits(batch).argmax(dim=1)
    assert (found == batch["targets"].argmax(dim=1)).float().mean() > 0.7


# Metrics


def questions_of(split) -> list[SceneQuestion]:
    """Questions of the world, each held by the truth of its record."""
    return [record.truth.question for record in split]


def test_validation_accuracy_is_a_count_by_hand(fitted):
    logged = fitted.trainer.callback_metrics
    for name in training_models.small_scenes().validation_splits:
        split = fitted.splits[name].records
        counted = {}
        with torch.no_grad():
            logits = fitted.module.logits(fitted.splits[name].batch(torch.arange(len(split))))
        for found, question in zip(logits.argmax(dim=1).tolist(), questions_of(split), strict=True):
            right = fitted.model.answers[found] == question.answer
            counted.setdefault(question.family, []).append(right)
            counted.setdefault("overall", []).append(right)
        assert set(counted) == {*fitted.module.soft_accuracy[name]._names}
        for family, hits in counted.items():
            assert float(logged[f"{name}/accuracy/{family}"]) == pytest.approx(np.mean(hits)), family
        assert float(logged[f"{name}/top1"]) == pytest.approx(np.mean(counted["overall"]))
        assert 0 < np.mean(counted["overall"]) < 1


@pytest.mark.parametrize("store", [TokenStore(), None])
def test_blind_baseline_sees_no_image(architecture, store):
    data = training_models.small_scenes()
    model = training_models.tiny_model(architecture)
    splits = question_splits(model, data, ("train", "validation"), store)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def answers() -> list:
        return blind_answers(
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

    torch.manual_seed(1)
    asked = questions_of(splits["validation"].records)
    first = answers()
    for split in splits.values():
        if store is not None:
            split.cache.image_tokens.fill_(torch.nan)
        else:
            split.records = RecordList(
                [replace(one, image=RenderedImage(255 - one.image.pixels)) for one in split.records]
            )
            split.dataset = RecordDataset(split.records, split.dataset.reader)
    torch.manual_seed(2)  # its own seed is all that it depends on
    assert answers() == first
    right = [model.answers[row] == one.answer for row, one in zip(first, asked, strict=True)]
    assert 0 < sum(right) < len(right)
    assert same_bits(before, dict(model.state_dict()))


# Checkpoints


def test_loaded_model_answers_as_the_trained_one(fitted):
    """Nothing but the file is needed: the configuration of CLIP that was given as a file is gone."""
    assert not Path(fitted.model.encoder.architecture).exists()
    loaded = clipmapper.load(fitted.checkpoint)
    assert not loaded.training
    split = fitted.splits["validation"].records
    answers = set()
    for number, question in list(enumerate(questions_of(split)))[::9]:
        image = split[number].image.pixels
        with torch.no_grad():
            logits = fitted.module.logits(fitted.splits["validation"].batch(torch.tensor([number])))
        answer = loaded.answer(image, question.text)
        assert answer == fitted.model.answer(image, question.text)
        # Training read cached tokens, in half precision: two answers may be closer than that tells apart.
        assert logits[0, fitted.model.answers.index(answer)] > logits.max() - 0.02
        answers.add(answer)
    assert len(answers) > 2
    weights = fitted.model.state_dict()
    assert same_bits(dict(weights), dict(loaded.state_dict()))


def test_checkpoint_says_everything_but_the_weights(fitted):
    described = torch.load(fitted.checkpoint, weights_only=True)["clipmapper"]
    assert described["answers"] == list(fitted.model.answers)
    assert described["tokenizer"] == "tiny-scenes-clip-for-tests"
    assert described["encoder"]["config"]["vision_cfg"]["patch_size"] == 24
    assert described["model"]["mapper"] in ("dual_flow", "single_flow") and described["model"]["width"] == 32


class WritesAFile:
    """A pickle can run code of whoever made it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged(path: Path, good: Path, kind: str) -> None:
    """Write a file that is no checkpoint of ours, in one of the ways in which files are not."""
    content = good.read_bytes()
    state = torch.load(good, weights_only=True)
    described = state["clipmapper"]
    objects = {
        "of another model": {"state_dict": {"weight": torch.zeros(2)}, "epoch": 3},
        "a tensor": torch.zeros(3),
        "a list": [1, 2],
        "nothing": None,
        "description of another kind": state | {"clipmapper": "v2"},
        "description without encoder": state | {"clipmapper": {"answers": ["yes"]}},
        "description without model": state | {"clipmapper": described | {"model": {}}},
        "weights of another width": state | {"clipmapper": described | {"answers": ["yes", "no"]}},
        "no weights": state | {"state_dict": {}},
        "weights that are none": state | {"state_dict": [1]},
        "pickled code": state | {"extra": WritesAFile(path.with_name("written"))},
    }
    if kind in objects:
        torch.save(objects[kind], path)
    elif kind == "pickled code, old format":
        torch.save(objects["pickled code"], path, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(WritesAFile(path.with_name("written"))))
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "cut short":
        path.write_bytes(content[:100])
    elif kind == "overwritten":
        path.write_bytes(content[:5000] + bytes(len(content) - 10_000) + content[-5000:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("accuracy: 97 %\n")
    elif kind == "picture":
        Image.new("RGB", (8, 8)).save(path, format="png")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    elif kind == "folder":
        path.mkdir()
    else:
        assert kind == "missing"


KINDS_OF_DAMAGE = [
    "missing", "folder", "empty", "text", "picture", "zip", "cut", "cut short", "overwritten",
    "of another model", "a tensor", "a list", "nothing", "description of another kind",
    "description without encoder", "description without model", "weights of another width", "no weights",
    "weights that are none", "pickled code", "pickled code, old format", "plain pickle",
]  # fmt: skip


@pytest.mark.parametrize("fitted", ["dual_flow"], indirect=True)
@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_bad_checkpoint_is_one_line(fitted, tmp_path, kind):
    path = tmp_path / "bad.ckpt"
    damaged(path, fitted.checkpoint, kind)
    with pytest.raises(UserError) as caught:
        clipmapper.load(path)
    line = str(caught.value)
    assert line.startswith(f"checkpoint={path}: ") and len(line.splitlines()) == 1
    # torch's own advice in this case is to load the file with everything that it may do.
    assert "weights_only" not in line and "\x1b" not in line
    assert not (tmp_path / "written").exists()


# Whole runs


@pytest.fixture(scope="module")
def whole_run(settings):
    """A run that nothing interrupted, made once for each way of training: ``whole_run(*overrides)``."""
    made: dict[tuple[str, ...], Path] = {}

    def run_of(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = train(settings(f"name=whole{len(made)}", *overrides))
        return made[overrides]

    return run_of


FEW = ("callbacks.pictures=0", "callbacks.methods=[weighted,random]", "callbacks.samples=3")
CACHED = (*FEW, "trainer.val_check_interval=3", "data.validation_scenes=15", "data.held_out_scenes=7")
TUNED = ("encoder.frozen=false", "model.mapper=single_flow", "callbacks=none")


def during_step(step: int, monkeypatch, action) -> None:
    """``action`` happens in the middle of that step (counted from 0), before its gradients."""
    original = VQAModule.training_step

    def training_step(module, batch, index):
        if module.global_step == step:
            action()
        return original(module, batch, index)

    monkeypatch.setattr(VQAModule, "training_step", training_step)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def power_cut() -> None:
    raise RuntimeError("power cut")


def assert_same_end(folder: Path, whole: Path) -> None:
    assert checkpoint(folder)["global_step"] == 7
    assert same_bits(state_of_training(folder), state_of_training(whole))
    results = [json.loads((path / RESULTS).read_text()) for path in (folder, whole)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0].get("explanations") == results[1].get("explanations")
    assert len(list(folder.parent.iterdir())) == 1  # the run went on in its own folder


@pytest.mark.parametrize(
    ("way", "step"), mostly_slow([(CACHED, 2), (TUNED, 4)], 2), ids=["frozen, before a validation", "tuned"]
)
def test_interrupted_and_resumed_is_as_if_never_interrupted(settings, whole_run, monkeypatch, way, step):
    whole = whole_run(*way)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = settings(f"name=stopped in step {step}", *way)
    with monkeypatch.context() as patched:
        during_step(step, patched, ctrl_c)
        with pytest.raises(RunInterrupted, match=f"after step {step + 1}"):
            train(stopped)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_same_end(train(replace(stopped, resume=True)), whole)


@pytest.mark.slow
def test_killed_run_goes_on_from_its_last_saving(settings, whole_run, monkeypatch):
    whole = whole_run(*CACHED)
    # How often a run saves does not change what comes out.
    killed = settings("name=killed", "trainer.checkpoint_interval=2", *CACHED)
    with monkeypatch.context() as patched:
        during_step(5, patched, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(killed)
    assert_same_end(train(replace(killed, resume=True)), whole)


@pytest.mark.parametrize(
    ("moment", "interval"),
    mostly_slow(
        [("last step", 3), ("last validation", "null"), ("validation behind fit", 3), ("baseline", 3)], ()
    ),
)
def test_stopped_at_the_end_and_resumed(settings, whole_run, monkeypatch, moment, interval):
    validated = f"trainer.val_check_interval={interval}"  # which says what the best is chosen from
    whole = whole_run(*CACHED, validated)
    stopped = settings(f"name=stopped in {moment}", *CACHED, validated, "trainer.checkpoint_interval=7")
    with monkeypatch.context() as patched:
        if moment == "last step":
            during_step(6, patched, ctrl_c)
        elif "validation" in moment:
            original = explanation_curves.perturb

            def perturb(*args, **kwargs):
                if (newest(stopped) / CHECKPOINT).exists():  # saved behind the last step, before validation
                    ctrl_c()
                return original(*args, **kwargs)

            patched.setattr(explanation_curves, "perturb", perturb)
        else:
            patched.setattr(vqa_run, "blind_answers", lambda *args, **kwargs: ctrl_c())
        with pytest.raises((RunInterrupted, KeyboardInterrupt)):
            train(stopped)
    assert_same_end(train(replace(stopped, resume=True)), whole)


@pytest.mark.parametrize(
    "explained", mostly_slow([(FEW,), (("callbacks.samples=2",),)], []), ids=["few", "all"]
)
def test_callback_leaves_training_as_it_is(settings, monkeypatch, request, explained):
    """With dropout, so that weights depend on the random state and on training mode; all weights train."""

    def with_dropout(*args):
        built = build_clipmapper(*args)
        built.head = nn.Sequential(nn.Dropout(0.5), built.head)
        return built

    monkeypatch.setattr(vqa_run, "build_clipmapper", with_dropout)
    common = ("encoder.frozen=false", "trainer.val_check_interval=4")
    name = f"name={request.node.callspec.id}"
    without = train(settings(f"{name} without", "callbacks=none", *common))
    explained = train(settings(name, *explained, *common))
    assert same_bits(state_of_training(explained), state_of_training(without))
    results = [json.loads((folder / RESULTS).read_text()) for folder in (explained, without)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert "explanations" in results[0] and "explanations" not in results[1]


def test_split_without_questions_of_a_family(settings):
    small = ("data.seed=11", "data.validation_scenes=1", "callbacks=none", "training.max_steps=1")
    folder = train(settings("name=few", *small))
    accuracy = json.loads((folder / RESULTS).read_text())["accuracy"]
    asked = {family for family, row in accuracy.items() if row["questions"]}
    assert 1 < len(asked) < len(accuracy)
    for family, row in accuracy.items():
        assert (row["validation"] is not None) == (row["blind"] is not None) == (family in asked)


def changed_weights(settings, whole_run, way: tuple[str, ...]) -> dict[str, bool]:
    """For every weight, whether training has changed any bit of it."""
    config = settings(*way)
    lightning.seed_everything(config.seed, verbose=False)
    fresh = build_clipmapper(asdict(config.encoder), asdict(config.model), ANSWERS).state_dict()
    trained = checkpoint(whole_run(*way))["state_dict"]
    return {name: not torch.equal(value, trained[f"model.{name}"]) for name, value in fresh.items()}


def test_frozen_encoder_keeps_every_bit(settings, whole_run):
    changed = changed_weights(settings, whole_run, CACHED)
    of_encoder = [changed[name] for name in changed if name.startswith("encoder.")]
    assert of_encoder and not any(of_encoder)
    assert changed["mapper.project_image.weight"] and changed["mapper.project_text.weight"]


def test_encoder_that_is_not_frozen_learns(settings, whole_run):
    changed = changed_weights(settings, whole_run, TUNED)
    for name in ("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "ln_final.bias"):
        assert changed[f"encoder.clip.{name}"]


# What cannot be resumed


def unfinished(settings, *overrides: str) -> tuple[Path, dict]:
    config = asdict(settings(*overrides))
    del config["resume"]
    folder = new_run_folder(config["output"], config["name"], config)
    (folder / CHECKPOINT).touch()
    return folder, config


def test_newest_run_that_left_a_checkpoint_is_resumed(settings):
    unfinished(settings, "name=several")
    newest_run, config = unfinished(settings, "name=several")
    new_run_folder(config["output"], "several", config)  # stopped before its first saving
    assert folder_to_resume(config["output"], "several", config) == newest_run


def test_nothing_to_resume(settings):
    with pytest.raises(UserError, match=r"resume=true: no run with a checkpoint in .*nobody"):
        train(settings("name=nobody", "resume=true"))


def test_finished_run_cannot_be_resumed(settings, whole_run):
    name = whole_run(*CACHED).parent.name
    with pytest.raises(UserError, match=f"resume=true: .*{name}.* is finished"):
        train(settings(f"name={name}", *CACHED, "resume=true"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("training.learning_rate=0.5", "training.learning_rate"),
        ("seed=4", "seed"),
        ("data.train_scenes=25", "data.train_scenes"),
        ("model.mapper=single_flow", "model.mapper"),
        ("encoder.pretrained=openai", "encoder.pretrained"),
        ("callbacks.methods=[gae]", "callbacks.methods"),
        ("callbacks=none", "callbacks"),
        ("logger=wandb", "logger"),
    ],
)
def test_run_is_not_resumed_with_other_settings(settings, change, key):
    name = f"name=changed {key}"
    folder, config = unfinished(settings, name)
    assert folder_to_resume(config["output"], config["name"], config) == folder
    with pytest.raises(UserError, match=rf"resume=true: {key}\S* is not what .* was started with"):
        train(settings(name, change, "resume=true"))


def test_run_without_callbacks_is_not_resumed_with_them(settings):
    unfinished(settings, "name=added", "callbacks=none")
    with pytest.raises(UserError, match=r"resume=true: callbacks\S* is not what"):
        train(settings("name=added", "resume=true"))


def newest(config) -> Path:
    return max(Path(config.output, config.name).iterdir())
