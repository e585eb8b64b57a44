"""Bad files and arguments by the hundred, in one process: official files, and arguments with dashes."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from clipmapper.benchmarks import command as benchmarks
from clipmapper.commands import make_shards as making_shards

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
BAD = [None, True, {}, [[]], "", float("nan"), "x\0y", "\ud800"]
GQA = {"1": {"imageId": "1", "question": "what?", "answer": "red", "types": {"structural": "query"}}}
A_OKVQA = [{"question_id": "q", "image_id": 1, "question": "w?", "direct_answers": ["a"] * 10}]
VIZWIZ = [{"image": "1.jpg", "question": "w?", "answers": [{"answer": "a"}] * 10}]
TEXTVQA = {"data": [{"question_id": 1, "image_id": "ab", "question": "w?", "answers": ["a"] * 10}]}
NOCAPS = {
    "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]
}  # fmt: skip
ENTRIES = {
    "gqa": (GQA, lambda c: c["1"], ("imageId", "question"), "question 1"),
    "a_okvqa": (A_OKVQA, lambda c: c[0], ("question_id", "image_id", "question"), "entry 1"),
    "vizwiz": (VIZWIZ, lambda c: c[0], ("image", "question"), "entry 1"),
    "textvqa": (TEXTVQA, lambda c: c["data"][0], ("question_id", "image_id", "question"), "entry 1"),
    "nocaps": (NOCAPS, lambda c: c["images"][0], ("id", "file_name"), "entry 1"),
    "coco_captions": (NOCAPS, lambda c: c["annotations"][0], ("image_id", "caption"), "entry 1"),
}
FIELDS = [(name, key, value) for name, (_, _, keys, _) in ENTRIES.items() for key in keys for value in BAD]
FIELDS += [("gqa", "types", value) for value in (True, "x\0y", "\ud800", [1], {"structural": [1]})]
FIELDS += [("gqa", "imageId", value) for value in ("../../etc/passwd", "/etc/passwd")]
FIELDS += [("nocaps", "file_name", value) for value in ("../1.jpg", "/1.jpg")]
WHOLE = [
    b"",
    b"[]",
    b"{}",
    b"1",
    b"null",
    b"{",
    b"[" * 200_000,
    b"1" * 5000,
    b"\xff\xfe{\0",
    b"\x1f\x8b",
    b"<html>",
]
LONG = "a" * 300
NO_COUNT = ["x", "0", "-1", "1.5", "nan", ""]
DASHES = [
    *(("benchmark", ["data", "--count", v], "--count") for v in NO_COUNT),
    *(("benchmark", ["data", "--size", v], "--size") for v in NO_COUNT),
    *(("benchmark", ["cache", "--scenes", v], "--scenes") for v in NO_COUNT),
    *(("benchmark", ["cache", "--batch-size", v], "--batch-size") for v in NO_COUNT),
    *(("benchmark", ["decoding", "--tokens", v], "--tokens") for v in NO_COUNT),
    *(("benchmark", ["relevance", "--batches", v], "--batches") for v in NO_COUNT),
    *(("benchmark", ["relevance", "--patience", v], "--patience") for v in ("x", "-1", "nan", "inf")),
    *(("benchmark", [name, "--device", "xx"], "device") for name in ("cache", "decoding", "relevance")),
    *(("benchmark", [name, "--output", v], "--output") for name in ("data", "cache") for v in ("", LONG)),
    ("benchmark", ["data", "--workers", "-1"], "--workers"),
    ("benchmark", ["data", "--seed", "-1"], "--seed"),
    ("benchmark", ["data", "--images", "nowhere"], "nowhere"), ("benchmark", ["x"], "'x'"),
    ("benchmark", [], "benchmark"),
    *(("causality", ["--samples", v], "--samples") for v in NO_COUNT),
    *(("causality", ["--seed", v], "--seed") for v in ("x", "-1", "1" * 30)),
    *(("causality", ["--layers", *v], "layers") for v in (["-1"], ["x"], ["0", "0"], ["99"])),
    *(("causality", ["--output", v], "--output") for v in ("", LONG)), ("causality", ["--foo"], "--foo"),
    ("causality", ["--architecture", "a.json"], "--architecture"),
    *(("shards", ["s", "data=manifest", "--images-per-shard", v], "--images-per-shard") for v in NO_COUNT),
    *(("shards", ["s", "data=manifest", "--seed", v], "--seed") for v in ("x", "-1", "1" * 30)),
    ("shards", ["", "data=manifest"], "folder"), ("shards", ["s"], "data="),
    ("shards", [LONG, "data=manifest"], "aaa"),
]  # fmt: skip


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


MAINS = {
    "benchmark": benchmarks.main, "shards": making_shards.main,
    "causality": script("attention_causality"), "convert": script("convert"),
}  # fmt: skip


@pytest.fixture
def ends(tmp_path, capfd, monkeypatch):
    """``ends(command, arguments, *names)``: with status 2 and one line that names these."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    def run(command: str, arguments: list[str], *names: str) -> None:
        with pytest.raises(SystemExit) as leaving:
            MAINS[command](arguments)
        printed = capfd.readouterr().err
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert leaving.value.code == 2 and len(lines) == 1 and len(lines[0]) <= 500, printed
        assert "Traceback" not in printed and all(name in lines[0] for name in names), printed

    return run


def converting(name: str, output: str = "out/x.jsonl") -> list[str]:
    return [name, "q.json", "--images", "images", "--split", "train", "--output", output]


@pytest.mark.parametrize(("name", "key", "value"), FIELDS)
def test_fields_of_official_files(ends, tmp_path, name, key, value):
    content, entry, _, where = ENTRIES[name]
    content = copy.deepcopy(content)
    entry(content)[key] = value
    (tmp_path / "q.json").write_text(json.dumps(content))
    ends("convert", converting(name), "q.json", where)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", WHOLE, ids=range(len(WHOLE)))
@pytest.mark.parametrize("name", ["gqa", "a_okvqa", "vizwiz", "textvqa", "nocaps", "easy_vqa"])
def test_whole_official_files(ends, tmp_path, name, content):
    (tmp_path / "q.json").write_bytes(content)
    ends("convert", converting(name), "q.json")


def test_a_key_that_stands_twice(ends, tmp_path):
    one = json.dumps(GQA["1"])
    other = one.replace("red", "blue")
    (tmp_path / "q.json").write_text(f'{{"7": {one}, "7": {other}}}')
    ends("convert", converting("gqa"), "q.json", "'7' stands twice")


@pytest.mark.parametrize(
    "output", ["", ".", "x.csv", "q.json", "q.json/x.jsonl", "/proc/x.jsonl", LONG + ".jsonl"]
)
def test_outputs_of_a_converter(ends, tmp_path, output):
    (tmp_path / "q.json").write_text(json.dumps(GQA))
    ends("convert", converting("gqa", output), "--output")
    assert json.loads((tmp_path / "q.json").read_text()) == GQA


@pytest.mark.parametrize(("command", "arguments", "names"), DASHES)
def test_arguments_with_dashes(ends, command, arguments, names):
    ends(command, arguments, names)


def test_a_classifier_that_is_damaged(ends, tmp_path):
    (tmp_path / "t.txt").write_text("a disc\n")
    folder = tmp_path / "c"
    folder.mkdir()
    given = ["--classifier", "c", "--texts", "t.txt"]
    ends("causality", given, "no tokenizer in it")
    (folder / "vocab.txt").write_text("[UNK]\n")
    for content in ("null", "{", "[]", '{"model_type": "nope"}'):
        (folder / "config.json").write_text(content)
        ends("causality", given, "--classifier c")
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}')
    (folder / "model.safetensors").write_bytes(b"xxxx")
    ends("causality", given, "--classifier c")


def test_a_repeated_key_with_one_value_is_no_mistake():
    from clipmapper.data.text_files import RepeatedKey, parsed_json

    assert parsed_json('{"a": [1], "a": [1]}') == {"a": [1]}
    with pytest.raises(RepeatedKey, match="'a' stands twice"):
        parsed_json('{"a": 1, "a": 2}')
