"""Runs that were begun, and models that were saved, before the program's files had the names of today.

``checkpoints/before_wings`` is what ``scripts/train.py`` of db169f5 has left for both tasks: of a CLIP with
few weights, 400 steps on 60 scenes (the settings are in each ``config.yaml``). ``expected.json`` is what that
commit answered, wrote and explained with these checkpoints.
"""

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.slow import mostly_slow
from support.training_models import train_settings

import clipmapper
from clipmapper.commands.train import train
from clipmapper.data.world.scenes import draw_scene, render_all

OLD = Path(__file__).parent / "checkpoints" / "before_wings"
QUESTIONS = ("what colour is the ring?", "is there a blue square?", "how many things are small?")
METHODS = ("weighted", "gae")


def unpacked(packed: Path, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.decompress(packed.read_bytes()))
    return file


def told(kind: str, folder: Path) -> list:
    """Ask the old checkpoint about three scenes."""
    model = clipmapper.load(unpacked(OLD / kind / "last.ckpt.xz", folder / "last.ckpt"))
    images, _ = render_all([draw_scene(1, "old runs", number) for number in range(len(QUESTIONS))])
    found = []
    for image, question in zip(images, QUESTIONS, strict=True):
        # The maps of words were averaged as they are then.
        asked = {"question": question} if kind == "vqa" else {"word_maps": "raw"}
        for method in METHODS:
            its = clipmapper.explain(model, image, method=method, **asked)
            if kind == "vqa":
                found.append(
                    [model.answer(image, question), its.score, dict(its.words), its.patches.tolist()]
                )
            else:
                found.append([model.caption(image), its.probabilities.tolist(), its.patches.tolist()])
    return found


def leaves(entry: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested lists and dictionaries, by its place."""
    if isinstance(entry, dict | list):
        for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
            yield from leaves(value, f"{where}/{key}")
    else:
        yield where, entry


def same(found: object, expected: object) -> None:
    """Equal, but for how another processor rounds."""
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert found.keys() == expected.keys()
    for where, value in expected.items():
        if isinstance(value, float):
            assert np.isclose(found[where], value, rtol=1e-4, atol=1e-5), where
        else:
            assert found[where] == value, where


@pytest.mark.parametrize("kind", mostly_slow(["vqa", "captioning"], ["vqa"]))
def test_an_old_checkpoint_says_what_it_said(kind, tmp_path):
    expected = json.loads((OLD / "expected.json").read_text())
    same(json.loads(json.dumps(told(kind, tmp_path))), expected[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqa", "captioning"])
def test_an_old_run_goes_on(kind, tmp_path, monkeypatch):
    """Its last validation was to come: it gives the results of then, explanations of all."""
    settings = yaml.safe_load((OLD / kind / "config.yaml").read_text())
    run = tmp_path / settings["output"] / settings["name"] / "2026-11-28_20-54-33"
    unpacked(OLD / kind / "last.ckpt.xz", run / "checkpoints" / "last.ckpt")
    shutil.copy(OLD / kind / "config.yaml", run)
    shutil.copy(OLD / "tiny-clip.json", tmp_path)
    unpacked(OLD / "tiny-clip.pt.xz", tmp_path / "tiny-clip.pt")
    monkeypatch.chdir(tmp_path)
    chosen = ["experiment=caption_scenes", "callbacks=relevance"] if kind == "captioning" else []
    given = [
        f"{where[1:].replace('/', '.')}={value}"
        for where, value in leaves({k: v for k, v in settings.items() if k not in ("logger", "callbacks")})
        if "_target_" not in where and value is not None and not where.split("/")[-1].isdigit()
    ]
    explained = ["callbacks.methods=[weighted,gae,random]", "callbacks.samples=6", "callbacks.pictures=1"]
    off = ["encoder.image_size=null", "logger=csv", "resume=true"]
    off += ["callbacks.word_maps=raw"] if kind == "captioning" else []
    assert train(train_settings(*chosen, *given, *explained, *off)) == run.relative_to(tmp_path)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (run, OLD / kind))
    for results in (found, expected):
        for key in ("settings", "files", "seconds", "answers", "written"):  # of which the last two are paths
            results.pop(key, None)
    found.pop("intervals", None)  # of few samples, which runs of then had not
    if kind == "captioning":  # a score of captions that there was not
        for direction in found["explanations"]["perturbation"]["caption"].values():
            direction.pop("mean_probability")
    same(found, expected)


if __name__ == "__main__":  # how expected.json was made
    import sys

    made = {kind: told(kind, Path(sys.argv[1])) for kind in ("vqa", "captioning")}
    (OLD / "expected.json").write_text(json.dumps(made))
