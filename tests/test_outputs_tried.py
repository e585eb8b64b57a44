"""Every command tries its outputs before it reads, loads or trains anything."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
from support.training_models import ROOT

from clipmapper import cli
from clipmapper.benchmarks import command as benchmark
from clipmapper.commands import make_shards as making_shards
from clipmapper.errors import UserError
from clipmapper.host.outputs import check_file, check_folder, write_whole


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# A command, its arguments with an output at OUT, the folder or file that it names; all inputs are missing,
# which each would complain about if it looked at them first.
COMMANDS = {
    "train": (cli.train, ["encoder.architecture=missing.json", "output={out}"]),
    "train with a token cache": (
        cli.train,
        ["encoder.architecture=missing.json", "training.token_cache_folder={out}", "output=fine"],
    ),
    "pretrain_clip": (cli.pretrain_clip, ["architecture=missing.json", "output={out}/weights.safetensors"]),
    "perturb": (cli.perturb, ["checkpoint=missing.ckpt", "output={out}"]),
    "evaluate": (cli.evaluate, ["checkpoint=missing.ckpt", "output={out}"]),
    "explain": (
        cli.explain,
        ["checkpoint=missing.ckpt", "image=missing.png", "question=what?", "output={out}"],
    ),
    "make_shards": (making_shards.main, ["{out}", "data=manifest", "data.path=missing.jsonl"]),
    "attention_causality": (
        lambda arguments: script("attention_causality").main(arguments),
        ["--checkpoint", "missing.ckpt", "--output", "{out}/results.json"],
    ),
    "benchmark": (benchmark.main, ["cache", "--output", "{out}"]),
    "convert": (
        lambda arguments: script("convert").main(arguments),
        ["gqa", "missing.json", "--images", "images", "--split", "train", "--output", "{out}/gqa.jsonl"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output_comes_first(tmp_path, monkeypatch, capsys, name):
    """A file stands where a folder is to be made: nobody can write there, the superuser neither."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    function, arguments = COMMANDS[name]
    out = tmp_path / "file" / "out"
    try:
        status = function([argument.format(out=out) for argument in arguments])
    except SystemExit as leaving:
        status = leaving.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert str(out) in error and "can't be written" in error and f"{tmp_path / 'file'} is a file" in error
    assert Path("file").read_text() == "kept" and [file.name for file in Path().iterdir()] == ["file"]


def test_nothing_is_left_of_the_trial(tmp_path):
    (tmp_path / "there.json").write_text("kept")
    check_folder(tmp_path / "a" / "b", "output=a/b")
    check_file(tmp_path / "c" / "new.json", "output=c/new.json")
    check_file(tmp_path / "there.json", "output=there.json")
    assert [file.name for file in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "kept"


def test_a_folder_where_a_file_is_to_be(tmp_path):
    with pytest.raises(UserError, match=r"^output=x: can't be written \(it is a folder\)$"):
        check_file(tmp_path, "output=x")


@pytest.mark.parametrize("failing", ["mkdir", "mkstemp", "write", "fsync"])
def test_any_refusal_is_one_line_that_leaves_nothing(tmp_path, monkeypatch, failing):
    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    where = {"mkdir": Path, "mkstemp": tempfile}.get(failing, os)
    monkeypatch.setattr(where, failing, refuse)
    with pytest.raises(UserError, match=r"^output=x: can't be written \(No space left on device\)$"):
        check_folder(tmp_path / "new", "output=x")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


FAILS = {"no room": "fsync", "not renamed": "replace"}


@pytest.mark.parametrize("failing", FAILS.values(), ids=FAILS)
@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_is_whole_or_as_before(tmp_path, monkeypatch, failing, there):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "results.json"
    if there:
        path.write_text("before")
    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "новое")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"] * there
    monkeypatch.undo()
    assert write_whole(path, "новое").read_text(encoding="utf-8") == "новое"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
