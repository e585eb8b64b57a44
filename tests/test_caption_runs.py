"""The three commands with a captioner: what training explains, ``explain`` and ``perturb``."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from support import training_models
from support.offline_run import OfflineRun
from support.slow import mostly_slow

from clipmapper import cli
from clipmapper.commands.train import train
from clipmapper.relevance import METHODS
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

# The methods that are cheap to tell apart; the others take the same way.
SOME = ("weighted", "rollout", "random")
RUN = (
    "experiment=caption_scenes",
    "encoder.pretrained=null",
    "data.train_scenes=20",
    "data.simple_scenes=9",
    "data.validation_scenes=6",
    "data.held_out_scenes=4",
    "training.batch_size=8",
    "training.max_steps=2",
    "model.width=32",
    "model.depth=1",
    "callbacks=relevance",
    "callbacks.samples=3",
    "callbacks.explained=probability",
    "callbacks.word_maps=raw",
    "callbacks.pictures=1",
    f"callbacks.methods=[{','.join(SOME)}]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("captioner")
    architecture = training_models.tiny_clip(place)
    settings = (f"encoder.architecture={architecture}", f"output={place / 'outputs'}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_DATA_DIR", str(place / "wandb-data"))
        return train(training_models.train_settings(*RUN, *settings))


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capfd):
    """``command(name, *changes)`` with the captioner's checkpoint: what it printed, and its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(name: str, *changes: str) -> tuple[int, str, str]:
        status = 0
        try:
            getattr(cli, name)([f"checkpoint={folder / CHECKPOINT}", *changes])
        except SystemExit as leaving:
            status = leaving.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(training_models.small_scenes().validation[0].image.pixels).save(path)
    return path


def numbers_of(found) -> list[float]:
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers_of(value)]
    return [found] if isinstance(found, float) else []


def test_training_explains_captions(folder):
    explained = json.loads((folder / RESULTS).read_text())["explanations"]
    assert explained["samples"] == 3
    caption = explained["perturbation"]["caption"]
    assert set(caption["positive"]) == {"log_probability", "mean_probability", "bleu_4", "cider"}
    for score in caption["negative"].values():
        assert set(score) == set(SOME)
    assert set(explained["perturbation"]["word"]["positive"]["word_probability"]) == set(SOME)
    assert {"colour", "shape"} <= set(explained["localisation"])
    assert all(map(math.isfinite, numbers_of(explained)))
    names = {path.name for path in (folder / "pictures").glob("*.png")}
    scores = ("log_probability", "mean_probability", "bleu_4", "cider", "word_probability")
    assert names == {
        "explanation_00_caption.png",
        "methods.png",
        *(f"perturbation_{score}.png" for score in scores),
    }


def test_the_same_is_logged_to_wandb(folder):
    (offline,) = (folder / "wandb").glob("offline-run-*")
    run = OfflineRun(offline)
    assert run.status == 0
    results = json.loads((folder / RESULTS).read_text())["explanations"]
    for method in SOME:
        logged = run.logged(f"perturbation/caption/positive/{method}/log_probability")
        area = results["perturbation"]["caption"]["positive"]["log_probability"][method]["area"]["mean"]
        assert logged[-1] == pytest.approx(area)
    assert run.logged("localisation/colour/mass/weighted")
    assert run.logged("explanations._type") == ["table-file"] and run.logged("explanations.nrows") == [1]
    artifacts = [contents_of(artifact) for artifact in run.artifacts]
    (contents,) = [found for found in artifacts if "explanations.table.json" in found]
    table = json.loads(contents["explanations.table.json"].read_text())
    assert table["columns"] == ["image", "word by word", "caption", "references", "curves"]
    for cell in (table["data"][0][k] for k in (0, 1, 4)):
        with Image.open(contents[cell["path"]]) as image:
            image.load()
    for name in ("methods", "perturbation_log_probability", "perturbation_word_probability"):
        assert run.logged(f"pictures/{name}._type") == ["image-file"]


def contents_of(artifact) -> dict[str, Path]:
    return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}


@pytest.mark.slow
def test_explain_writes_a_strip(command, picture, tmp_path):
    status, printed, errors = command("explain", f"image={picture}", "compare=true", "output=out")
    assert status == 0, errors
    assert printed.startswith("caption: ") and "probability of words" in printed
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 2 and pictures[0].stem.startswith("scene_")
    assert {path.stem.rpartition("_")[2] for path in pictures} == {"weighted", "methods"}


@pytest.mark.parametrize(
    ("change", "word"), mostly_slow([("word=ring", "ring"), ("word=1", "red")], [("word=ring", "ring")])
)
def test_explain_explains_one_word(command, picture, change, word):
    caption = "caption=a red ring, left of a cross"
    status, printed, errors = command("explain", f"image={picture}", caption, change, "word_weights=clip")
    assert status == 0, errors
    assert printed.startswith("explained caption: a red ring, left of a cross\n")
    line = next(line for line in printed.splitlines() if line.startswith("probability of words"))
    assert [one for one in ("red", "ring", "left", "cross") if one in line] == [word]


@pytest.mark.slow
def test_perturb(command, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmapper.commands.perturb._PICTURES", 1)
    settings = (
        "samples=3",
        "methods=[weighted,random]",
        "output=result",
        "word_weights=cider",
        "explained=probability",
    )
    status, printed, errors = command("perturb", *settings, "caption_scores=[cider,log_probability]")
    assert status == 0, errors
    assert "CIDEr-D of the caption" in printed and "uniform map" in printed
    results = json.loads((tmp_path / "result" / RESULTS).read_text())
    assert (results["settings"]["explained"], results["settings"]["word_maps"]) == ("probability", "scaled")
    results = results["explanations"]
    assert set(results["perturbation"]["caption"]["positive"]) == {"cider", "log_probability"}
    chunks = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "result" / "chunks").rglob("*.npz"))
    assert chunks == [f"result/chunks/removal/{test}/chunk_00000.npz" for test in ("caption", "word")]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("explain", ("question=what is it?",), "question: this checkpoint writes captions"),
        ("explain", ("caption=a red ring", "word=blue"), "word='blue' is not in the caption 'a red ring'"),
        ("explain", ("caption=",), "caption: is empty"),
        ("explain", ("word_weights=best",), "word_weights: 'best' is not one of mean, clip"),
        ("perturb", ("caption_scores=[cidre]",), "caption_scores"),
        ("perturb", ("word_weights=clop",), "word_weights"),
        (
            "perturb",
            ("word_maps=thin",),
            "word_maps: 'thin' is not one of scaled, raw, root, largest, coverage",
        ),
        (
            "explain",
            ("explained=odds",),
            "explained: 'odds' is not one of logit, probability, log_probability",
        ),
    ],
)
def test_mistakes_are_one_line(command, picture, name, changes, message):
    image = (f"image={picture}",) if name == "explain" else ()
    status, printed, errors = command(name, *image, *changes)
    assert (status, printed) == (2, "")
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1


def test_some_methods_are_methods():
    assert set(SOME) <= set(METHODS)
