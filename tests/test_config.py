"""Every file of ``conf/`` composes and fits its schema; every mistake is one line that names the setting."""

import importlib
import inspect
import os
import subprocess
import sys
import types
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.slow import mostly_slow

from clipmapper import cli
from clipmapper.commands.study_cells import finished_cell
from clipmapper.commands.study_models import run_settings, study_models
from clipmapper.errors import UserError
from clipmapper.models.exported import model_path
from clipmapper.relevance import METHODS
from clipmapper.settings import schema as config
from clipmapper.settings.checks import built
from clipmapper.settings.commands import (
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    PerturbConfig,
    PretrainConfig,
)
from clipmapper.settings.compose import quoted
from clipmapper.settings.data import ScenesCaptionsConfig, ScenesVQAConfig
from clipmapper.settings.keys import Section, setting_named
from clipmapper.settings.study import StudyConfig
from clipmapper.tasks.captioning.settings import CaptionModelConfig, ScenesCaptionTrainingConfig
from clipmapper.tasks.registry import task_named
from clipmapper.tasks.vqa.settings import ScenesVQATrainingConfig, VQAModelConfig
from clipmapper.training.task import Task

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
WITH_OPTIONS = ["make_shards", "convert", "attention_causality"]
COMMANDS = {
    "train": ("clipmapper.commands.train", "train", config.TrainConfig, []),
    "explain": (
        "clipmapper.commands.explain",
        "explain_file",
        ExplainConfig,
        ["checkpoint=model.ckpt", "image=photo.png", "question=what colour is the circle?"],
    ),
    "perturb": (
        "clipmapper.commands.perturb",
        "perturb_checkpoint",
        PerturbConfig,
        ["checkpoint=model.ckpt"],
    ),
    "evaluate": (
        "clipmapper.commands.evaluate",
        "evaluate",
        EvaluateConfig,
        ["checkpoint=[runs/a=1.ckpt, model.ckpt]"],
    ),
    "export": (
        "clipmapper.commands.export",
        "export_checkpoint",
        ExportConfig,
        ["checkpoint=model.ckpt", "folder=mine"],
    ),
    "study": ("clipmapper.commands.study", "study", StudyConfig, []),
    "pretrain_clip": ("clipmapper.commands.pretrain_clip", "run_pretraining", PretrainConfig, []),
}
CAPTIONS = "experiment=caption_scenes"
STUDIES = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
# Of clipmapper train.
CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "study"
)


def with_what_belongs_to_it(choice: str) -> list[str]:
    """The choice, and the experiment whose task it is for."""
    group, _, name = choice.partition("=")
    if choice in (
        "data=manifest",
        "data=huggingface",
        "data=shards",
        "experiment=caption_manifest",
        "experiment=fine_tune",
    ):
        return [choice, "data.path=my"]
    if choice == "logger=other":
        return [choice, "logger._target_=lightning.pytorch.loggers.CometLogger"]
    if choice == "training=vqa":
        return ["data=manifest", "data.path=my", choice]
    if choice == "training=captioning":
        return ["experiment=caption_manifest", "data.path=my", choice]
    captions = group != "experiment" and "caption" in name and name != "coco_captions"
    return [CAPTIONS, choice] if captions else [choice]


class Runs:
    """Runs ``clipmapper …`` in this process, with the work itself replaced by taking note of the settings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.configs: list = []
        self.raises: BaseException | None = None
        for home, name, _, _ in COMMANDS.values():
            module = types.ModuleType(home)
            setattr(module, name, self._work)
            monkeypatch.setitem(sys.modules, home, module)

    def _work(self, given: Section) -> dict:
        self.configs.append(given)
        if self.raises is not None:
            raise self.raises
        return {"score": 0.5} if isinstance(given, PretrainConfig) else Path("no run")

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["clipmapper", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code or 0
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    def config(self, *arguments: str):
        """The settings that the work was given."""
        self.configs.clear()
        status, _, errors = self(*arguments)
        assert (status, errors) == (0, "")
        return self.configs[0]

    def error(self, *arguments: str) -> str:
        """The one line of a mistake."""
        status, printed, errors = self(*arguments)
        assert status == 2
        assert not self.configs
        assert printed == ""
        assert errors.startswith("error: ") and errors.endswith("\n") and errors.count("\n") == 1
        return errors.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Runs:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it: put back what was there
    return Runs(monkeypatch, capsys)


# Compositions

_composed: dict[str, config.TrainConfig] = {}


def composed(run: Runs, choice: str) -> config.TrainConfig:
    """The settings of ``clipmapper train`` with a file of ``conf/``; composing takes its time."""
    if choice not in _composed:
        _composed[choice] = run.config("train", *with_what_belongs_to_it(choice))
    return _composed[choice]


def test_every_file_is_covered():
    shared = {"plain_hydra", "token_cache", "gpt2_decoder"}
    assert {path.stem for path in CONF.glob("*.yaml")} == {*COMMANDS, *shared}
    groups = {choice.partition("=")[0] for choice in CHOICES}
    assert groups == {"model", "encoder", "data", "training", "trainer", "logger", "callbacks", "experiment"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_gets_its_typed_settings(run, command, tmp_path):
    _, _, schema, required = COMMANDS[command]
    given = run.config(command, *required)
    assert type(given) is schema
    assert [f.name for f in fields(schema) if getattr(given, f.name) == "???"] == []
    # Nothing is left behind, and nobody has gone elsewhere: runs make their own folders.
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path


# One of each group, and what the tests below compose too.
COMPOSED = [
    choice for number, choice in enumerate(CHOICES)
    if choice.split("=")[0] in ("data", "training", "callbacks")
    or choice.split("=")[0] != CHOICES[number - 1].split("=")[0]
]  # fmt: skip


@pytest.mark.parametrize("choice", mostly_slow(CHOICES, COMPOSED))
def test_every_choice_composes_and_validates(run, choice):
    given = composed(run, choice)
    group, _, name = choice.partition("=")
    if group == "experiment":
        assert given.name == name
        text = (CONF / "experiment" / f"{name}.yaml").read_text()
        command = "scripts/train.py\n" if name == "vqa_scenes" else f"scripts/train.py experiment={name}\n"
        assert f"# Command:   python {command}" in text
        assert all(f"# {heading}:" in text for heading in ("Hardware", "Time", "Expected"))
    elif name == "none":
        assert getattr(given, group) is None
    else:
        assert isinstance(getattr(given, group), Section)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_composes_and_its_models_can_be_trained(run, name):
    given = run.config("study", f"study={name}")
    text = (CONF / "study" / f"{name}.yaml").read_text()
    command = "scripts/study.py\n" if name == "scenes" else f"scripts/study.py study={name}\n"
    assert f"# Command:   python {command}" in text
    assert all(f"# {heading}:" in text for heading in ("Hardware", "Time"))
    for cell in study_models(given):
        assert cell.seed is None or run_settings(cell).seed == cell.seed
        assert cell.seed is not None or model_path(cell.given).exists()


def test_the_study_of_scenes_has_every_method_below_ten_floors(run):
    dear = ("integrated_gradients", "occlusion", "beyond_intuition", "leave_one_out")
    cheap = {name for name in METHODS if not name.startswith(dear)}
    assert set(run.config("study").methods) == cheap


def test_committed_models_of_the_study_of_scenes_are_of_its_settings(run):
    """A study that is begun with them does not compute them again."""
    given = replace(run.config("study"), output=str(ROOT / "docs" / "results" / "study"))
    committed = [cell for cell in study_models(given) if cell.folder.exists()]
    assert committed
    for cell in committed:
        kept = finished_cell(given, cell)
        assert kept is not None and kept.about["name"] == cell.name
        assert kept.values.methods == tuple(given.methods)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["study=quik"], "study: 'quik' is not one of quick, scenes; did you mean quick?"),
        (
            ["+models.mine=[]"],
            "models.mine: [] is neither a checkpoint nor a list of settings for clipmapper",
        ),
        (["+models.mine=3"], "models.mine: 3 is neither"),
        (["+models.con=scenes-vqa"], "models: 'con': 'con' is a device on Windows"),
        (["only_model=nobody"], "only_model: 'nobody' is not one of vqa_dual_flow"),
        (["only_seed=7"], "only_seed: 7 is not one of seeds=[0, 1, 2]"),
        (["seeds=[1,1]"], "seeds: 1 is listed twice"),
        (["fewer.removal=501"], "fewer.removal: 501 is not between 1 and samples=500"),
        (["+fewer.love=3"], "fewer.love: no score"),
        (
            ["+of_model.captionr.samples=3"],
            "of_model.captionr: no model of this study; there are vqa_dual_flow",
        ),
        (["of_model.captioner.samples=5"], "captioner.removal: 40 is not between 1 and samples=5"),
        (["methods=[wieghted]"], "did you mean weighted?"),
        (["sampels=3"], "sampels: there is no such setting; did you mean samples?"),
        (["jobs=0"], "jobs: 0 is less than 1"),
        (["study=quick", "models.scenes-vqa=null", "models.scenes-captioner=null"], "models: there are none"),
    ],
)
def test_mistakes_in_a_study_are_one_line(run, arguments, line):
    assert line in run.error("study", *arguments)


def test_experiment_is_overridden_by_the_command_line(run):
    given = run.config("train", "experiment=vqa_b32_dual_flow", "model=paper_single_flow", "seed=3")
    assert (given.model.mapper, given.model.depth, given.model.width) == ("single_flow", 8, 512)
    assert given.encoder.architecture == "ViT-B-32-quickgelu" and given.encoder.frozen is True
    assert given.trainer.precision == "bf16-mixed" and given.seed == 3


def test_mapper_switches_by_one_setting(run):
    both = [run.config("train", *more).model for more in ([], ["model.mapper=single_flow"])]
    assert [m.mapper for m in both] == ["dual_flow", "single_flow"]
    assert both[0].width == both[1].width and both[1].width % both[1].heads == 0


def test_groups_have_one_class_per_implementation(run):
    given = run.config("train")
    assert type(given.logger) is config.WandbLoggerConfig and given.logger.mode == "offline"
    assert type(given.data) is ScenesVQAConfig
    assert type(given.model) is VQAModelConfig and type(given.training) is ScenesVQATrainingConfig
    captions = run.config("train", CAPTIONS)
    assert type(captions.data) is ScenesCaptionsConfig and captions.callbacks is None
    assert type(captions.model) is CaptionModelConfig
    assert type(captions.training) is ScenesCaptionTrainingConfig
    assert type(given.callbacks) is config.RelevanceCallbackConfig
    assert type(run.config("train", "logger=csv").logger) is config.CSVLoggerConfig


def test_options_of_another_logger_are_the_users(run):
    options = ("+logger.options={tags: [a, b], deep: {x: 1}}", "+logger.options.rate=0.5")
    given = run.config("train", "logger=other", "logger._target_=my.Logger", *options)
    assert type(given.logger) is config.OtherLoggerConfig and given.logger._target_ == "my.Logger"
    assert given.logger.options == {"tags": ["a", "b"], "deep": {"x": 1}, "rate": 0.5}


def test_values_have_their_types(run):
    given = run.config(
        "train", "training.learning_rate=1", "encoder.pretrained=null", "trainer.devices=2", "resume=yes"
    )
    assert given.training.learning_rate == 1.0 and type(given.training.learning_rate) is float
    assert given.encoder.pretrained is None and given.trainer.devices == "2" and given.resume is True


def test_sweep_runs_every_value(run, tmp_path):
    status, _, errors = run("train", "--multirun", "seed=3,5")
    assert (status, errors) == (0, "") and [c.seed for c in run.configs] == [3, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    assert [p.name for p in (tmp_path / "outputs").iterdir()] == ["multirun"]


def test_scores_of_pretraining_are_printed(run):
    assert run("pretrain_clip") == (0, "score: 0.500\n", "")


# The schema against what it stands for


def test_methods_are_those_that_exist():
    from clipmapper.relevance import ALSO_CALLED, METHODS

    assert all(name in METHODS for name in ALSO_CALLED.values()) and METHODS.keys().isdisjoint(ALSO_CALLED)
    for section, key in (
        (ExplainConfig, "method"),
        (PerturbConfig, "methods"),
        (EvaluateConfig, "methods"),
        (config.RelevanceCallbackConfig, "methods"),
    ):
        (field,) = [field for field in fields(section) if field.name == key]
        assert (*METHODS, *ALSO_CALLED) == field.metadata["choices"]()


def test_scalars_are_those_that_exist():
    from clipmapper.relevance.explained_scalar import EXPLAINED

    for section in (ExplainConfig, PerturbConfig, EvaluateConfig, config.RelevanceCallbackConfig):
        (field,) = [field for field in fields(section) if field.name == "explained"]
        assert field.metadata["choices"]() == EXPLAINED


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.split("=")[0] in ("data", "callbacks")])
def test_target_takes_exactly_these_settings(run, choice):
    section = getattr(composed(run, choice), choice.partition("=")[0])
    if section is None:
        return
    module, _, name = section._target_.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    settings = {f.name for f in fields(section)} - {"_target_"}
    assert settings == set(inspect.signature(target).parameters)


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("training=")])
def test_class_of_training_names_a_task(run, choice):
    task = task_named(composed(run, choice).training.task)
    assert isinstance(task, Task) and not type(task).__abstractmethods__


# Mistakes


MISTAKES = [
    # a key that does not exist: changed, added, forced, in a section given whole, in a sweep
    (["training.max_step=3"], "training.max_step", "did you mean training.max_steps?"),
    (["--multirun", "training.max_step=3,4"], "training.max_step", "did you mean training.max_steps?"),
    (["+sede=3"], "sede", "did you mean seed?"),
    (["logger=csv", "logger.mode=online"], "logger.mode", "the logger that is chosen"),
    (["logger=other", "logger._target_=a.B", "logger.options=3"], "logger.options", "{key: value}"),
    (
        ["logger=other", "logger._target_=a.B", "logger.options.x=3"],
        "logger.options.x",
        "+logger.options.x=…",
    ),
    # groups
    (
        ["logger=wanbd"],
        "logger",
        "'wanbd' is not one of csv, mlflow, other, tensorboard, wandb; did you mean wandb?",
    ),
    (["~logger"], "~logger", "cannot be deleted"),
    # values of a wrong type
    (["training.max_steps=abc"], "training.max_steps", "'abc' is not an int or null"),
    (["seed=true"], "seed", "true is not an int"),
    # values that are not allowed
    (["model.mapper=dual"], "model.mapper", "not one of dual_flow, single_flow; did you mean dual_flow?"),
    (["callbacks.methods=[gae,gae]"], "callbacks.methods", "'gae' is listed twice"),
    (["callbacks.pictures=9", "callbacks.samples=8"], "callbacks.pictures", "9 pictures of 8 samples"),
    ([CAPTIONS, "training.first_share=0.5"], "training.first_share", "at most simple_share"),
    (["training.learning_rate=0"], "training.learning_rate", "0.0 is not above 0"),
    (["name="], "name", "empty"),
    (
        ["training=vqqa"],
        "training",
        "'vqqa' is not one of captioning, captioning_scenes, vqa, vqa_s",
    ),
    # what does not belong together
    (["data=scenes_captions"], "data", "has captions, but training is for vqa"),
    (["data=manifest", "data.path=m.jsonl", "training=vqa_scenes"], "training", "choose training=vqa"),
    ([CAPTIONS, "model=scenes"], "model", "experiment=caption_scenes) chooses what"),
    # captioning
    ([CAPTIONS, "training.objective=scst"], "training.checkpoint", "goes on from a captioner"),
    ([CAPTIONS, "training.blind_steps=3"], "training.blind_steps", "not a setting of the training that"),
    # grammar
    (["=3"], "cannot read '=3'", "key=value"),
    (["seed=1,2"], "seed=1,2", "--multirun"),
    (["--seed=3"], "unrecognized arguments", "key=value, without dashes"),
]
# Of the same kinds.
MORE_MISTAKES = [
    (["training={max_step: 3}"], "training.max_step", "did you mean training.max_steps?"),
    (["+zzz=3"], "zzz", "there are callbacks, data, encoder, experiment, init, logger, model, name"),
    (["training.zzz.yyy=3"], "training.zzz.yyy", "no such setting"),
    (["logger=other"], "logger._target_", "no value"),
    (["hydra.job.nmae=x"], "hydra.job.nmae", "no such setting"),
    (["loger=wandb"], "loger", "did you mean logger?"),
    (["training.learning_rate=x"], "training.learning_rate", "'x' is not a number"),
    (["trainer.val_check_interval=x"], "trainer.val_check_interval", "'x' is not an int or null"),
    (["encoder.frozen=maybe"], "encoder.frozen", "'maybe' is not true or false"),
    (["callbacks.methods=gae"], "callbacks.methods", "'gae' is not a list"),
    (["training.max_steps=${nope}"], "training.max_steps", "'nope' not found"),
    (["callbacks.methods=[]"], "callbacks.methods", "empty"),
    (["model.heads=5"], "model.heads", "5 heads do not divide the width of 128"),
    (["training.max_steps=0"], "training.max_steps", "0 is less than 1"),
    (["callbacks.confidence=1"], "callbacks.confidence", "1.0 is not below 1"),
    (["training.simple_share=1.1"], "training.simple_share", "1.1 is more than 1"),
    (["training.learning_rate=nan"], "training.learning_rate", "not a finite number"),
    (["trainer.devices=all"], "trainer.devices", "'all' is not a number of devices"),
    (["+training.max_step=3"], "training.max_step", "did you mean training.max_steps?"),
    (["++training.max_step=3"], "training.max_step", "did you mean training.max_steps?"),
    (["+trainng.max_steps=3"], "trainng.max_steps", "did you mean training.max_steps?"),
    (["+training={max_step: 3}"], "training.max_step", "did you mean training.max_steps?"),
    (["max_steps=3"], "max_steps", "did you mean training.max_steps?"),
    (["training.max_steps.zzz=3"], "training.max_steps.zzz", "no such setting"),
    (["logger=csv", "+logger.mode=online"], "logger.mode", "the logger that is chosen"),
    (["logger=other", "logger._target_=a.B", "+logger.options.x=inf"], "logger.options.x", "inf"),
    (["logger=csv", "+logger.options.x=3"], "logger.options", "the logger that is chosen"),
    (["callbacks=none", "callbacks.samples=3"], "callbacks.samples", "the callbacks that is chosen"),
    (["+loger=wandb"], "loger", "did you mean logger?"),
    (["experimnt=vqa_scenes"], "experimnt", "did you mean experiment?"),
    (["experiment=vqa_scene"], "experiment", "did you mean vqa_scenes?"),
    (["logger=null"], "logger", "csv, mlflow, other, tensorboard, wandb"),
    (["model=3"], "model", "paper_dual_flow"),
    (["training.max_steps=1.5"], "training.max_steps", "1.5 is not an int or null"),
    (
        ["training.max_steps=null"],
        "training.max_steps",
        "neither of max_steps and training.max_epochs are given",
    ),
    (["encoder.frozen=2"], "encoder.frozen", "2 is not true or false"),
    (["training=5"], "training", "'5' is not one of captioning, captioning_scenes, vqa"),
    (["callbacks.methods=[gae,weigthed]"], "callbacks.methods", "did you mean weighted?"),
    (
        [CAPTIONS, "training.first_wordings=[place]"],
        "training.first_wordings",
        "'place' is not one of",
    ),
    ([CAPTIONS, "training=captioning"], "training", "choose training=captioning_scenes"),
    (["seed=-1"], "seed", "-1 is less than 0"),
    (["trainer.precision=bf16"], "trainer.precision", "not one of 32-true, 16-mixed, bf16-mixed"),
    (["training=captioning"], "data", "has questions, but training is for captioning"),
    (["training=vqa"], "training", "choose training=vqa_scenes"),
    (["training.questions_per_image=2"], "training.questions_per_image", "world are drawn one by one"),
    (
        ["data=manifest", "data.path=a", "training.balance=answers", "training.questions_per_image=2"],
        "training.questions_per_image",
        "for every answer (training.balance=answers) are drawn one by one; give 1",
    ),
    (
        ["data=shards", "data.path=a", "training=vqa", "training.questions_per_image=2"],
        "training.questions_per_image",
        "a stream (data=shards) has an order of its own; give 1",
    ),
    (
        [CAPTIONS, "training.objective=reinforce"],
        "training.objective",
        "not one of cross_entropy, scst",
    ),
    ([CAPTIONS, "training.checkpoint="], "training.checkpoint", "is empty"),
    ([CAPTIONS, "training.label_smoothing=1"], "training.label_smoothing", "1.0 is not below 1"),
    (
        ["training.objective=scst"],
        "training.objective",
        "not a setting of the training that is chosen",
    ),
    ([CAPTIONS, "model.vocabulary=all"], "model.vocabulary", "one of tokenizer, data"),
    (["a b"], "cannot read 'a b'", "key=value"),
]


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [*MISTAKES, *mostly_slow(MORE_MISTAKES, ())],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_in_the_settings_of_training(run, arguments, key, says):
    line = run.error("train", *arguments)
    assert line.startswith(f"{key}:") or line.startswith(key)
    assert says in line


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (
            "explain",
            [],
            "checkpoint, image: no value; give them as checkpoint=… image=…",
        ),
        ("explain", ["checkpoint=a"], "image: no value; give it as image=…"),
        ("explain", ["checkpoint=a", "image=b", "question="], "question: is empty"),
        ("explain", ["checkpoint=a", "image=b", "question=c", "method=gea"], "method: 'gea' is not one of"),
        ("explain", ["checkpoint=a", "image=b", "question=c", "device=gpu"], "device: 'gpu' is not one of"),
        (
            "explain",
            ["model=scenes"],
            "model: there is no such setting; there are answer, architecture, caption, c",
        ),
        ("perturb", ["checkpoint=a", "split=heldout"], "split: 'heldout' is not one of validation, held_out"),
        ("evaluate", ["checkpoint=[]"], "checkpoint: is empty"),
        ("evaluate", ["checkpoint=[a, b, a]"], "checkpoint: 'a' is listed twice"),
        ("evaluate", ["checkpoint=null"], "checkpoint: None is not a path, and not a list of some, as [a,b]"),
        ("evaluate", ["checkpoint=a", "devices=all"], "devices: 'all' is not a number of devices"),
        (
            "evaluate",
            ["checkpoint=a", "explain=true", "split=all"],
            "explain: the samples that are explained",
        ),
        ("pretrain_clip", ["variants=7"], "batch_size: "),
        ("pretrain_clip", ["steps=7"], "steps: there is no such setting; did you mean max_steps"),
    ],
)
def test_mistake_in_the_settings_of_other_commands(run, command, arguments, says):
    assert says in run.error(command, *arguments)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "training:\n  max_steps: many\n",
            "experiment/mine.yaml: training.max_steps: 'many' is not an int or null",
        ),
        ("training:\n  max_step: 3\n", "experiment/mine.yaml: training.max_step: there is no such setting"),
        ("trainng:\n  max_steps: 3\n", "experiment/mine.yaml: trainng: there is no such setting"),
        ("training: [1\n", "mine.yaml"),
        ("defaults:\n  - override /model: big\n", "model: 'big' is not one of paper_dual_flow"),
    ],
)
def test_mistake_in_a_file_of_ones_own(run, tmp_path, content, says):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{content}")
    assert says in run.error("train", "--config-dir", "mine", "experiment=mine")


# The run


def test_user_error_of_the_run_is_one_line(run):
    run.raises = UserError("checkpoint=x: no such file")
    assert run("train") == (2, "", "error: checkpoint=x: no such file\n")


def test_target_that_does_not_exist_is_one_line(run, monkeypatch):
    work = sys.modules["clipmapper.commands.train"]
    monkeypatch.setattr(work, "train", lambda given: built(asdict(given.data)))
    says = "_target_=no.such.Data: Error locating target 'no.such.Data'"
    assert run.error("train", "data._target_=no.such.Data") == says
    assert "'os.system' is blocklisted" in run.error("train", "data._target_=os.system")
    assert "cannot be called with these settings" in run.error("train", "data._target_=pathlib.Path.home")


def test_other_errors_keep_their_traceback(run):
    run.raises = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("train")
    run.raises = KeyError("a bug of the kind that a mistyped setting would be too")
    with pytest.raises(KeyError):
        run("train")


def test_interruption_is_one_line(run):
    from clipmapper.errors import RunInterrupted

    run.raises = KeyboardInterrupt()
    assert run("train") == (130, "", "interrupted\n")  # no promise: nobody has looked at the disk
    assert run("explain", *COMMANDS["explain"][3]) == (130, "", "interrupted\n")
    run.raises = RunInterrupted("stopped after step 7")
    for command in ("train", "pretrain_clip"):
        line = "interrupted: stopped after step 7\n"
        assert run(command) == (130, "", line)


def test_interruption_as_lightning_reports_it(run, monkeypatch):
    def work(given: config.TrainConfig) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(sys.modules["clipmapper.commands.train"], "train", work)
    assert run("train")[0] == 130


def test_the_command_line_is_as_given_during_the_run(run, monkeypatch):
    """Lightning starts the processes of further devices with it."""
    seen = []
    training = sys.modules["clipmapper.commands.train"]
    monkeypatch.setattr(training, "train", lambda given: seen.append(sys.argv) or Path("no run"))
    run("train", "seed=3", "name=it's")
    assert seen == [["clipmapper", "train", "seed=3", "name=it's"]]


# The command


def test_help_and_version(run):
    status, printed, _ = run("--help")
    assert status == 0 and all(f"  {command}" in printed for command in (*COMMANDS, *WITH_OPTIONS))
    assert run("--version") == run("train", "--version") == (0, "clipmapper 0.1.0\n", "")
    status, printed, _ = run("train", "--cfg", "job", "seed=9")
    assert status == 0 and "seed: 9\n" in printed and not run.configs


@pytest.mark.slow
def test_help_on_settings(run):
    status, printed, _ = run("train", "--help")
    assert status == 0 and "experiment: caption_coco_b32" in printed and "max_steps: " in printed


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_commands_with_options(run, command):
    status, printed, _ = run(command, "--help")
    assert status == 0 and printed.startswith(f"usage: clipmapper {command} ")
    assert "--help says what is allowed" in run.error(command, "--unknown")


@pytest.mark.parametrize(("arguments", "says"), [([], "no command"), (["trian"], "unknown command 'trian'")])
def test_unknown_command(run, arguments, says):
    line = run.error(*arguments)
    assert says in line
    assert "usage: clipmapper train|explain|perturb|evaluate|study|export|pretrain_clip" in line


_PIECES = st.one_of(st.text(max_size=3), st.sampled_from(["${", "${oc.env:HOME}", "$", "{", "}", "\\", "'"]))


@given(
    st.lists(_PIECES, min_size=1)
    .map("".join)
    .filter(lambda text: text not in ("", "null", "???") and text[0] not in "'\"")
)
def test_free_text_reaches_its_setting_as_it_is(text):
    """Through Hydra's grammar and OmegaConf's, which would put the user's folder for ${oc.env:HOME}."""
    (argument,) = quoted([f"question={text}"], ExplainConfig)
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert override.key_or_group == "question"
    assert OmegaConf.create({"question": override.value()}).question == text


def test_free_text_of_a_whole_run(run):
    question, checkpoint = 'what\'s left of "it", [the ball], (x)=y', "runs/epoch=3,step=4 (1).ckpt"
    given = run.config(
        "explain", f"checkpoint={checkpoint}", "image=b", "answer=null", f"question={question}"
    )
    assert (given.question, given.checkpoint, given.answer) == (question, checkpoint, None)


def test_one_checkpoint_or_several(run, tmp_path):
    """A path may have commas and an equals sign; one that is written as a list is looked for first."""
    assert run.config("evaluate", "checkpoint=runs/epoch=3,step=4.ckpt").checkpoint == [
        "runs/epoch=3,step=4.ckpt"
    ]
    given = run.config("evaluate", "checkpoint=[runs/a=1.ckpt, 'scenes vqa']")
    assert given.checkpoint == ["runs/a=1.ckpt", "scenes vqa"]
    (tmp_path / "[a,b]").mkdir()
    assert run.config("evaluate", "checkpoint=[a,b]").checkpoint == ["[a,b]"]


def test_settings_are_found_by_their_key():
    field, hint = setting_named("callbacks.methods[0]", config.TrainConfig)
    assert field.name == "methods" and hint is str
    assert setting_named("logger.mode", config.TrainConfig)[1] is str
    assert setting_named("encoder.pretrained", config.TrainConfig)[1] == str | None
    for key in ("training.nope", "nope", "seed.nope", "training.max_steps.nope"):
        assert setting_named(key, config.TrainConfig) is None


# In a process of its own


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (
            "+training.max_step=3",
            "error: training.max_step: there is no such setting; did you mean training.max_steps?\n",
        ),
        ("training.max_steps=abc", "error: training.max_steps: 'abc' is not an int or null\n"),
    ],
)
def test_script_in_a_process_of_its_own(tmp_path, argument, says):
    """Also: the mistake is reported before anything as slow as torch is imported."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print({'torch', 'lightning'} & set(sys.modules)))\n"
        f"sys.argv = ['train.py', {argument!r}]\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("HYDRA_FULL_ERROR", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=1800,
    )
    assert (done.returncode, done.stderr, done.stdout) == (2, says, "set()\n")
    assert list(tmp_path.iterdir()) == []
