"""Bad inputs by the hundred, in one process: each ends with exit status 2 and lines that name the culprit."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmapper import cli
from clipmapper.commands import make_shards as making_shards

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
WHOLE = ["x", "1.5", "null", "[1]", "true", "1e400", "nan", "''"]  # what is no whole number
NUMBER = ["x", "null", "[1]", "nan", "-1"]
CHOICE = ["x", "null", "[]", "1", "''"]
KEYS = {
    "train": {
        "seed": [*WHOLE, "-1"], "training.max_steps": [*WHOLE, "-1"], "training.batch_size": [*WHOLE, "0"],
        "trainer.num_nodes": [*WHOLE, "0"], "trainer.checkpoint_interval": [*WHOLE, "0"],
        "training.learning_rate": NUMBER, "trainer.gradient_clip_val": NUMBER,
        "trainer.timeout_minutes": [*NUMBER[:-2], "nan", "0"],
        "trainer.precision": CHOICE, "trainer.accelerator": CHOICE, "trainer.strategy": CHOICE,
        "trainer.devices": ["x", "0", "-2", "1.5", "'1,'"], "model.mapper": CHOICE, "data.seed": WHOLE,
        "name": ["../x", "a/b", "..", "''", "'a\x1bb'"], "output": ["''", "' '"], "resume": ["nowhere", "2"],
        "encoder.frozen": ["x", "2", "[]"], "nothing": ["1"], "trainer.nothing": ["1"], "data": ["nothing"],
        "experiment": ["nothing", "../x"], "logger": ["nothing"], "callbacks.methods": ["[]", "[x]", "x"],
    },
    "explain": {
        "method": CHOICE, "compare": ["x", "2"], "device": ["x", "cuda:x", "''"],
        **{key: ["x", "[]", "1", "''"] for key in ("word_weights", "word_maps", "explained")},
        "output": ["''"], "image": ["''"], "nothing": ["1"], "checkpoint": ["''"],
    },
    "perturb": {
        "samples": [*WHOLE, "0"], "batch_size": [*WHOLE, "0"], "chunk": [*WHOLE, "0"], "seed": [*WHOLE, "-1"],
        "confidence": [*NUMBER, "0", "1"], "methods": ["[]", "x", "[x]", "[gae,gae]", "null"],
        "split": CHOICE, "device": ["x", "''"], "resume": ["x"], "output": ["''"], "nothing": ["1"],
        **{key: ["x", "[]", "1", "''"] for key in ("word_maps", "explained")},
    },
    "evaluate": {
        "samples": [*WHOLE, "0"], "batch_size": [*WHOLE[:2], "[1]", "true", "1e400", "nan", "''", "0"],
        "chunk": [*WHOLE, "0"], "seed": [*WHOLE, "-1"], "confidence": [*NUMBER, "0", "1"],
        "methods": ["[]", "x", "[x]", "[gae,gae]", "null"], "split": CHOICE, "precision": CHOICE,
        "token_precision": CHOICE, "accelerator": CHOICE, "devices": ["x", "0", "-2", "1.5", "'1,'"],
        "resume": ["x"], "explain": ["x", "2"], "output": ["''"], "nothing": ["1"],
        "checkpoint": ["''", "null", "[]", "[a,a]", "[a,]"],
    },
    "pretrain_clip": {
        "max_steps": [*WHOLE, "0"], "batch_size": [*WHOLE, "0", "7"], "workers": [*WHOLE, "-1"],
        "learning_rate": [*NUMBER, "0"], "weight_decay": NUMBER, "precision": CHOICE, "seed": [*WHOLE, "-1"],
        "output": ["''"], "architecture": ["''", "nothing"], "resume": ["x"], "nothing": ["1"],
    },
}  # fmt: skip
# `word_weights=null` and the like are no mistake: it is the default, the task's own choice.
MUST = {
    "train": (), "explain": ("checkpoint=x", "image=x"), "perturb": ("checkpoint=x",), "pretrain_clip": (),
    "evaluate": ("checkpoint=x",),
}  # fmt: skip
SETTINGS = [
    (command, f"{key}={value}", key.rpartition(".")[2])
    for command, keys in KEYS.items()
    for key, values in keys.items()
    for value in dict.fromkeys(values)
]
GOOD = {"image": "a.png", "question": "what is it?", "answers": ["red"]}
NO_TEXT = [None, True, [], {}, ""]  # a number is read as its text
ROWS = [
    *(({**GOOD, key: value}, key) for key in ("image", "question") for value in NO_TEXT),
    *(({**GOOD, "answers": value}, "answers") for value in (None, True, {}, "", [[]], [None], [{}], [""])),
    *(({**GOOD, "split": value}, "split") for value in ("x", 1, [], "\x1b[31m")),
    *(({**GOOD, "image": value}, "my.jsonl") for value in ("no.png", "broken.png", "/", "..", "a" * 5000)),
    *(({"image": "a.png", "captions": value}, "caption") for value in (None, True, {}, "", [None], [""])),
    ([], "my.jsonl"), (1, "my.jsonl"), (None, "my.jsonl"), ("x", "my.jsonl"), ({}, "my.jsonl"),
]  # fmt: skip


@pytest.fixture
def ends(tmp_path, capfd, monkeypatch):
    """``ends(main, arguments, names)``: it leaves with status 2, clean lines and an untouched output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(main, arguments: list[str], names: str) -> None:
        try:
            status = main(arguments)
        except SystemExit as leaving:
            status = leaving.code
        printed = capfd.readouterr()
        assert status == 2, printed
        lines = printed.err.splitlines()
        assert any(line.startswith("error: ") for line in lines), printed.err
        assert "Traceback" not in printed.err and "\x1b" not in printed.err + printed.out
        assert max(map(len, lines)) <= 500, printed.err
        assert names in printed.err
        assert not [path for path in tmp_path.rglob("out/**/*") if path.is_file()]

    return run


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(("command", "argument", "names"), SETTINGS)
def test_settings(ends, command, argument, names):
    output = () if argument.startswith("output=") else ("output=out",)
    key = argument.partition("=")[0]
    others = [given for given in (*MUST[command], *output) if not given.startswith(key + "=")]
    ends(getattr(cli, command), [argument, *others], names)


@pytest.mark.parametrize(("row", "names"), ROWS)
def test_rows_of_a_manifest(ends, tmp_path, row, names):
    Image.fromarray(np.full((80, 80, 3), 90, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "my.jsonl").write_text(json.dumps(row) + "\n")
    experiment = (
        ["experiment=caption_manifest"] if isinstance(row, dict) and "captions" in row else ["data=manifest"]
    )
    ends(cli.train, [*experiment, "data.path=my.jsonl", "data.workers=0", "output=out"], names)
    ends(making_shards.main, ["out", "data=manifest", "data.path=my.jsonl"], names if row else "my.jsonl")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x04.", b"{}", b"\x1b[31m"])
@pytest.mark.parametrize("command", ["explain", "perturb", "evaluate", "attention_causality"])
def test_checkpoints(ends, tmp_path, command, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    if command == "attention_causality":
        ends(script(command), ["--checkpoint", "x.ckpt", "--output", "out/x.json"], "x.ckpt")
    else:
        image = ["image=x.ckpt", "question=a"] if command == "explain" else []
        ends(getattr(cli, command), ["checkpoint=x.ckpt", "output=out", *image], "x.ckpt")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"1", b"null", b"{", b"[1]", b'{"questions": 1}', b"\xff\xfe{"]
)
@pytest.mark.parametrize("name", ["gqa", "ok_vqa", "textvqa", "vizwiz", "nocaps"])
def test_converters(ends, tmp_path, name, content):
    (tmp_path / "x.json").write_bytes(content)
    given = [name, "x.json", "--images", ".", "--split", "train", "--output", "out/x.jsonl"]
    ends(script("convert"), given, "error: ")
