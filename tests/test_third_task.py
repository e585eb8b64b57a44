"""A task that the package does not know is trained, explained, perturbed and reported."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from support import matching, training_models
from support.matching import ANSWERS, Matching, MatchingModelConfig, MatchingTrainingConfig

import clipmapper
from clipmapper.commands.perturb import perturb_checkpoint
from clipmapper.commands.train import train
from clipmapper.settings.commands import PerturbConfig
from clipmapper.settings.schema import TrainingConfig
from clipmapper.tasks import registry


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    registry.register(Matching())
    folder = tmp_path_factory.mktemp("matching")
    config = training_models.train_settings(
        "experiment=caption_scenes", f"encoder.architecture={training_models.tiny_clip(folder)}",
        "encoder.pretrained=null", "data.train_scenes=64", "data.simple_scenes=8",
        "data.validation_scenes=12", "data.held_out_scenes=12", "training.max_steps=6",
        "trainer.val_check_interval=6",
        "training.batch_size=8", "callbacks=relevance",
        "callbacks.samples=4", "callbacks.pictures=1", "callbacks.methods=[weighted,gae]", "logger=csv",
        f"output={folder}",
    )  # fmt: skip
    common = {one.name: getattr(config.training, one.name) for one in fields(TrainingConfig)}
    model = {name: value for name, value in training_models.TINY_MAPPER.items()}
    config = replace(
        config, model=MatchingModelConfig(**model), training=MatchingTrainingConfig(**common), name="matching"
    )
    yield train(config)
    registry._OTHERS.clear()


def test_it_is_trained_explained_and_scored(run):
    results = json.loads((run / "results.json").read_text())
    assert (
        set(results["matching"]) == {"validation/accuracy", "held_out/accuracy"}
        and results["objective"]["value"] >= 0
    )
    assert set(results["explanations"]["perturbation"]) == {"image", "text"}
    assert (run / "pictures" / "perturbation_accuracy.png").is_file()
    assert len(list((run / "pictures").glob("explanation_*.png"))) == 1


@pytest.mark.slow
def test_its_checkpoint_says_and_explains(run, tmp_path):
    model = clipmapper.load(run / "checkpoints" / "last.ckpt")
    image = np.zeros((72, 72, 3), np.uint8)
    found = clipmapper.explain(model, image, caption="a red ring", method="gae")
    assert found.answer in ANSWERS and found.patches.shape == (3, 3) and np.isfinite(found.patches).all()
    with pytest.raises(
        clipmapper.UserError, match=r"this model tells whether .* takes caption=\.\.\., no word"
    ):
        clipmapper.explain(model, image, caption="a red ring", word=1)
    settings = {one.name: None for one in fields(PerturbConfig)} | {
        "checkpoint": str(run / "checkpoints" / "last.ckpt"), "methods": ["weighted"],
        "scores": ["removal"], "samples": 3, "split": "held_out", "output": str(tmp_path), "resume": False,
        "batch_size": 64, "chunk": 2, "confidence": 0.9, "seed": 0, "device": "cpu",
    }  # fmt: skip
    folder = perturb_checkpoint(PerturbConfig(**settings))
    assert json.loads((folder / "results.json").read_text())["explanations"]["samples"] == 3


def test_it_is_short():
    """Another task takes so many lines, imports included."""
    text = Path(matching.__file__).read_text()
    assert text.count("\n") <= 150
