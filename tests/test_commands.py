"""The commands end to end: the real scripts in processes of their own, and their mistakes."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import training_models

from clipmapper import cli
from clipmapper.data.world.data import ScenesVQA
from clipmapper.data.world.questions import CHANCE
from clipmapper.evaluation.explanation_scores import curves as explanation_curves
from clipmapper.relevance import COMPARED as METHODS
from clipmapper.tasks.vqa.pictures import perturbation_table
from clipmapper.tasks.vqa.task import accuracy_table
from clipmapper.training.shown import console, files_table

SCORES = ("accuracy", "probability")
PANELS = [(m, d) for m in ("image", "text") for d in ("positive", "negative")]
HEADINGS = ["image positive ↓", "image negative ↑", "text positive ↓", "text negative ↑"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return training_models.trained_by_script(tmp_path_factory)


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained.run_folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def results(trained) -> dict:
    return json.loads((trained.run_folder / "results.json").read_text())


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "A photo (1).png"
    Image.fromarray(training_models.picture(0)).save(path)
    return path


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def numbers_in(node: object) -> list[float]:
    if isinstance(node, dict):
        return [x for value in node.values() for x in numbers_in(value)]
    if isinstance(node, list):
        return [x for value in node for x in numbers_in(value)]
    return [node] if isinstance(node, int | float) and not isinstance(node, bool) else []


def lines_of(printed: str, title: str, end: str = "└") -> list[str]:
    """The rows of the printed table with that title, the row of headings first."""
    lines = printed.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(title))
    stop = next(n for n in range(start, len(lines)) if lines[n].startswith(end))
    return [line for line in lines[start + 1 : stop] if line[0] in "┃│"]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]


# scripts/train.py


def test_results_have_the_accuracy_of_every_family(results):
    assert list(results["accuracy"]) == [*CHANCE, "overall"]
    validation = ScenesVQA(60, 40, 40, 40, 4, seed=0).validation
    for family, row in results["accuracy"].items():
        asked = [q for q in validation if family in (q.family, "overall")]
        assert set(row) == {"questions", "validation", "held_out", "blind", "chance"}
        assert row["questions"] == len(asked) > 0
        assert all(0 <= row[split] <= 1 for split in ("validation", "held_out", "blind"))
        # A share of so many questions.
        right = row["validation"] * len(asked), row["blind"] * len(asked)
        assert right == pytest.approx([round(x) for x in right], abs=1e-4)
        assert row["chance"] == CHANCE.get(family)


def assert_complete(explanations: dict, samples: int) -> None:
    assert explanations["samples"] == samples and explanations["confidence"] == 0.95
    for modality, direction in PANELS:
        for score in SCORES:
            column = explanations["perturbation"][modality][direction][score]
            assert list(column) == list(METHODS)
            for method, entry in column.items():
                area = entry["area"]
                assert 0 <= area["low"] <= area["mean"] <= area["high"] <= 1
                assert ("difference_to_weighted" in entry) == (method != "weighted")
                if method != "weighted":
                    difference = entry["difference_to_weighted"]
                    expected = area["mean"] - column["weighted"]["area"]["mean"]
                    assert difference["mean"] == pytest.approx(expected, abs=1e-9)
                    assert difference["low"] <= difference["mean"] <= difference["high"]
    for modality in ("image", "text"):
        found = explanations["localisation"][modality]
        assert 0 < found["area_baseline"] < 1 and list(found["methods"]) == list(METHODS)
        for scores in found["methods"].values():
            for score in ("mass", "rank", "pointing"):
                assert 0 <= scores[score]["low"] <= scores[score]["mean"] <= scores[score]["high"] <= 1


def test_results_have_every_method(results):
    assert_complete(results["explanations"], 8)
    values = results["explanations"]["perturbation"]["image"]["positive"]["probability"]
    assert len({entry["area"]["mean"] for entry in values.values()}) > 4


def test_results_can_be_read_by_a_program(results):
    assert results["name"] == "vqa_scenes" and results["seconds"] > 0
    assert results["settings"]["training"]["max_steps"] == 6
    assert all(math.isfinite(number) for number in numbers_in(results))


def test_files_are_where_the_results_say(trained, results):
    files = {what: trained.folder / path for what, path in results["files"].items()}
    assert {"checkpoint", "results", "heat maps", "methods", "perturbation curves", "W&B run"} == set(files)
    assert all(path.exists() for path in files.values())
    assert all(path.is_relative_to(trained.run_folder) for path in files.values())
    pictures = sorted(path.name for path in files["heat maps"].glob("*.png"))
    assert re.fullmatch(r"explanation_00_\w+\.png", pictures[0])
    assert pictures[1:] == ["methods.png", "perturbation_accuracy.png", "perturbation_probability.png"]
    for path in files["heat maps"].rglob("*.png"):
        pixels = opened(path)
        colours = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        assert min(pixels.shape[:2]) > 400 and len(np.unique(colours)) > 100


def test_tables_are_printed(trained, results):
    accuracy = lines_of(trained.printed, "Accuracy (%)")
    assert cells_of(accuracy[0]) == [
        "family", "questions", "validation", "held-out combinations", "blind", "chance",
    ]  # fmt: skip
    for line, (family, row) in zip(accuracy[1:], results["accuracy"].items(), strict=True):
        shares = [row[key] for key in ("validation", "held_out", "blind", "chance")]
        percent = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        assert cells_of(line) == [family.replace("_", " "), str(row["questions"]), *percent]
    areas = lines_of(trained.printed, "Perturbation: area under soft accuracy (%), 95 % interval")
    assert cells_of(areas[0]) == ["method", *HEADINGS]
    for line, method in zip(areas[1:], METHODS, strict=True):
        name, *cells = cells_of(line)
        assert name == method
        for cell, (modality, direction) in zip(cells, PANELS, strict=True):
            area = results["explanations"]["perturbation"][modality][direction]["accuracy"][method]["area"]
            shown = [f"{100 * area[key]:.1f}" for key in ("mean", "low", "high")]
            assert re.findall(r"[\d.]+", cell) == shown
    localisation = lines_of(trained.printed, "Localisation against the truth (%), 95 % interval")
    assert [cells_of(line)[0] for line in localisation] == ["method", *METHODS]


def test_paths_are_printed(trained, results):
    # A long path goes on in the next line of its cell.
    printed = "".join(cells_of(line)[1] for line in lines_of(trained.printed, "Written"))
    assert printed == "".join(results["files"].values())


def test_nothing_but_progress_on_stderr(trained):
    left = [line for line in re.split(r"[\r\n]", trained.errors) if not re.match(r"\s*(\x1b.*)?$", line)]
    assert [line for line in left if "explanations: " not in line] == []


# scripts/explain.py and the console command


EXPLAIN = ("question=is the ring left of the red square?", "compare=true", "answer=left")


@pytest.fixture(scope="module")
def explained(checkpoint, picture, tmp_path_factory):
    arguments = (f"checkpoint={checkpoint}", f"image={picture}", *EXPLAIN)
    return training_models.script("explain", *arguments, folder=tmp_path_factory.mktemp("script"))


def test_explain_prints_the_answer_and_writes_pictures(explained):
    finished = explained
    assert (finished.status, finished.errors) == (0, "")
    assert "question: is the ring left of the red square?\n" in finished.printed
    assert re.search(r"^explained answer: left \(probability 0\.\d{3}\)$", finished.printed, re.MULTILINE)
    words = r"is -?\d\.\d{3}  the -?\d\.\d{3}  ring -?\d\.\d{3}  left"
    assert re.search(rf"^relevance of words \(weighted\): {words}", finished.printed, re.MULTILINE)
    written = sorted(path.relative_to(finished.folder) for path in finished.folder.rglob("*.png"))
    stem = r"outputs/explain/a-photo-1_is-the-ring-left-of-the-red-square-[0-9a-f]{8}"
    assert len(written) == 2 and re.fullmatch(rf"{stem}_methods\.png", str(written[0]))
    assert written[1] == Path(str(written[0]).replace("_methods.png", "_weighted.png"))
    for path in written:
        assert min(opened(finished.folder / path).shape[:2]) > 400


@pytest.mark.slow
def test_console_command_does_what_the_script_does(explained, checkpoint, picture, tmp_path):
    arguments = (f"checkpoint={checkpoint}", f"image={picture}", *EXPLAIN)
    by_script = explained
    by_command = training_models.console_command("explain", *arguments, folder=tmp_path)
    assert by_command.status == by_script.status == 0
    assert by_command.printed == by_script.printed and by_command.errors == by_script.errors
    pictures = [
        {path.relative_to(run.folder): path.read_bytes() for path in run.folder.rglob("*.png")}
        for run in (by_script, by_command)
    ]
    assert pictures[0] == pictures[1]


# scripts/perturb.py


PERTURB = ("samples=5", "chunk=2", "output=result", "split=held_out")


@pytest.fixture(scope="module")
def perturbed(checkpoint, tmp_path_factory):
    arguments = [f"checkpoint={checkpoint}", *PERTURB]
    return training_models.script("perturb", *arguments, folder=tmp_path_factory.mktemp("perturb"))


@pytest.mark.slow
def test_perturb_scores_every_method(perturbed):
    assert perturbed.status == 0, perturbed.errors
    results = json.loads((perturbed.folder / "result" / "results.json").read_text())
    assert_complete(results["explanations"], 5)
    assert results["settings"]["split"] == "held_out"
    for name in ("soft accuracy", "probability of the predicted answer"):
        table = lines_of(perturbed.printed, f"Perturbation: area under {name} (%), 95 % interval")
        assert [cells_of(line)[0] for line in table] == ["method", *METHODS]
    assert "Localisation against the truth" in perturbed.printed
    names = sorted(path.name for path in (perturbed.folder / "result" / "pictures").glob("*.png"))
    assert len(names) == 5 + 3
    for path in (perturbed.folder / "result" / "pictures").glob("*.png"):
        assert opened(path).ndim == 3
    chunks = sorted(path.name for path in (perturbed.folder / "result" / "chunks" / "removal").iterdir())
    assert chunks == ["chunk_00000.npz", "chunk_00001.npz", "chunk_00002.npz"]


@pytest.fixture
def again(perturbed, checkpoint, monkeypatch, capsys):
    """``again(*overrides)``: the same command here; how many samples it computed anew, and its results."""
    monkeypatch.chdir(perturbed.folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    computed = []
    original = explanation_curves.perturb

    def counting(*args, **kwargs):
        computed.append(len(kwargs["sample_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(explanation_curves, "perturb", counting)
    monkeypatch.setattr("clipmapper.commands.perturb._PICTURES", 0)

    def run(*overrides: str, output: str = "few") -> tuple[list[int], dict]:
        computed.clear()
        cli.perturb([f"checkpoint={checkpoint}", *PERTURB, *overrides, f"output={output}"])
        capsys.readouterr()
        return list(computed), json.loads((perturbed.folder / output / "results.json").read_text())

    return run


@pytest.mark.slow
def test_perturb_takes_finished_chunks_from_disk(perturbed, again):
    by_script = json.loads((perturbed.folder / "result" / "results.json").read_text())["explanations"]
    # A number that does not depend on the memory for a batch, but on everything else.
    computed, results = again("batch_size=5", output="result")
    assert computed == [] and results["explanations"] == by_script

    few, folder = "methods=[weighted,random]", perturbed.folder / "few"
    computed, results = again(few)
    first = results["explanations"]
    assert computed == [2, 2, 1]
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("chunks/removal/*")
    }
    assert len(digests) == 3
    # As after an interruption in the second chunk.
    (folder / "chunks" / "removal" / "chunk_00001.npz").unlink()
    (folder / "chunks" / "removal" / "chunk_00002.npz").unlink()
    computed, results = again(few)
    assert computed == [2, 1] and results["explanations"] == first
    assert {
        p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("chunks/removal/*")
    } == digests
    computed, results = again(few, "seed=1", "chunk=7")
    assert computed == [5] and results["explanations"] != first
    computed, _ = again("resume=false", "seed=1", "chunk=7", "methods=[random]")
    assert computed == [5]


# Mistakes


@pytest.fixture
def mistake(checkpoint, picture, tmp_path, monkeypatch, capfd):
    """``mistake(command, *changes)``: the one line that a command in this process ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    given = {
        "explain": {"checkpoint": checkpoint, "image": picture, "question": "is there a ring?"},
        "perturb": {"checkpoint": checkpoint},
        "train": {},
    }

    def run(command: str, *changes: str) -> str:
        settings = {**given[command], **dict(change.split("=", 1) for change in changes)}
        with pytest.raises(SystemExit) as leaving:
            getattr(cli, command)([f"{key}={value}" for key, value in settings.items()])
        printed = capfd.readouterr()
        assert leaving.value.code == 2 and printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # nothing was begun
        return printed.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize("command", ["explain", "perturb"])
def test_bad_checkpoint(mistake, checkpoint, tmp_path, command):
    said = mistake(command, "checkpoint=gone.ckpt")
    assert said.startswith("checkpoint=gone.ckpt: no such file, and not a model that is shipped (scenes-")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:100_000])
    assert mistake(command, "checkpoint=cut.ckpt").startswith(
        "checkpoint=cut.ckpt: not a readable checkpoint"
    )
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert mistake(command, "checkpoint=text.ckpt").startswith("checkpoint=text.ckpt: not a readable")


def test_bad_image(mistake, tmp_path, picture):
    assert mistake("explain", "image=gone.png") == "image=gone.png: no such file"
    (tmp_path / "text.png").write_text("not an image")
    assert mistake("explain", "image=text.png").startswith("image=text.png: not a readable image")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:3000])
    assert mistake("explain", "image=cut.png").startswith("image=cut.png: not a readable image")


@pytest.mark.parametrize(
    ("command", "change", "says"),
    [
        ("explain", "question=", "question: is empty"),
        ("explain", "question=  ", "question: is empty"),
        ("explain", "method=lime", "method: 'lime' is not one of weighted, "),
        ("perturb", "methods=[weighted,lime]", "methods: 'lime' is not one of weighted, "),
        ("train", "callbacks.methods=[lime]", "callbacks.methods: 'lime' is not one of weighted, "),
        ("explain", "answer=gren", "answer 'gren' is not one of the model's 24 answers; did you mean green"),
        ("explain", "compair=true", "compair: there is no such setting; did you mean compare?"),
        ("perturb", "+sample=3", "sample: there is no such setting; did you mean samples?"),
        ("perturb", "samples=many", "samples: 'many' is not an int"),
        ("train", "training.learning_rate=fast", "training.learning_rate: 'fast' is not a number"),
        ("explain", "output=gone.png/x", "gone.png"),
    ],
)
def test_mistake_is_one_line(mistake, tmp_path, command, change, says):
    (tmp_path / "gone.png").write_text("a file where a folder should be")
    line = mistake(command, change)
    assert line.startswith(says) or (change.startswith("output") and says in line)


@pytest.mark.slow
def test_mistake_in_a_process_of_its_own(tmp_path, picture):
    """No warning of a library stands before the line."""
    (tmp_path / "bad.ckpt").write_bytes(b"\x80\x02}q\x00.")
    arguments = ("checkpoint=bad.ckpt", f"image={picture}", "question=is there a ring?")
    finished = training_models.script("explain", *arguments, folder=tmp_path)
    assert (finished.status, finished.printed) == (2, "")
    assert finished.errors.startswith("error: checkpoint=bad.ckpt: ") and finished.errors.count("\n") == 1


# Tables


def printed_table(capsys, table) -> str:
    console().print(table)
    return capsys.readouterr().out


def test_text_of_users_is_printed_as_it_is(capsys):
    """Brackets and colons would be styles and emoji to rich."""
    paths = {"checkpoint": Path("/runs/[bold]/[/x]:ring:.ckpt"), "results": "a\\[red]b"}
    rows = printed_table(capsys, files_table(paths)).splitlines()
    assert [cells_of(line)[1] for line in rows if line.startswith("│")] == list(map(str, paths.values()))


def test_missing_numbers_are_left_out(capsys):
    row = {"questions": 4, "validation": 0.5, "held_out": None, "blind": 0.25, "chance": None}
    full = {"questions": 3, "validation": 1.0, "held_out": 0.5, "blind": 0.5, "chance": 0.25}
    rows = printed_table(capsys, accuracy_table({"colour": full, "overall": row})).splitlines()
    assert cells_of(rows[-2]) == ["overall", "4", "50.0", "", "25.0", ""]
    rows = printed_table(capsys, accuracy_table({"overall": row})).splitlines()
    assert cells_of(rows[-2]) == ["overall", "4", "50.0", "25.0"]  # a column that nothing is known of


def test_best_and_undecided_methods_are_marked(capsys):
    def entry(mean, *difference):
        area = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        if not difference:
            return {"area": area}
        low, high = difference
        return {"area": area, "difference_to_weighted": {"mean": 0.0, "low": low, "high": high}}

    column = {"weighted": entry(0.3), "gae": entry(0.4, 0.05, 0.15), "random": entry(0.35, -0.1, 0.2)}
    perturbation = {"image": {direction: {"accuracy": column} for direction in ("positive", "negative")}}
    table = perturbation_table({"confidence": 0.9, "perturbation": perturbation})
    rows = printed_table(capsys, table).splitlines()
    assert rows[0].rstrip() == "Perturbation: area under soft accuracy (%), 90 % interval"
    assert [cells_of(line) for line in rows if line.startswith("│")] == [
        ["weighted", "30.0 [20.0, 40.0]", "30.0 [20.0, 40.0]"],
        ["gae", "40.0 [30.0, 50.0]", "40.0 [30.0, 50.0]"],
        ["random", "35.0 [25.0, 45.0] =", "35.0 [25.0, 45.0] ="],
    ]
    assert [cell.style == "bold" for cell in table.columns[1].cells] == [True, False, False]  # lowest
    assert [cell.style == "bold" for cell in table.columns[2].cells] == [False, True, False]  # highest
