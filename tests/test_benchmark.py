"""``scripts/benchmark.py``: what it measures is what it says, and it says it in JSON."""

import json

import pytest
import training_models

from clipmapper.benchmarks import captions, command
from clipmapper.benchmarks.timing import measured


def test_ways_take_turns():
    calls = []
    found = measured({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4  # the first of each does not count
    assert len(found["a"]["all_s"]) == 3
    assert found["b"]["fastest_s"] <= found["b"]["median_s"] <= max(found["b"]["all_s"])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    encoder = {"architecture": training_models.tiny_clip(tmp_path), "pretrained": None}
    settings = {"width": 16, "depth": 1, "heads": 2, "image_position_embedding": True, "vocabulary": "data"}
    monkeypatch.setitem(captions.MODELS, "scenes", (encoder, settings))
    return ["--repeats", "2", "--output", str(tmp_path / "out"), "--device", "cpu"]


def test_decoding(tiny, tmp_path, capsys):
    command.main(["decoding", *tiny, "--images", "2", "--tokens", "4"])
    found = json.loads((tmp_path / "out" / "decoding.json").read_text())
    for way in ("cached", "uncached"):
        assert found["tokens_per_s"][way] == pytest.approx(8 / found["times"][way]["median_s"])
        assert len(found["times"][way]["all_s"]) == 2
    assert found["machine"]["device"] == "cpu" and found["settings"]["tokens"] == 4
    assert "tokens/s with the cache" in capsys.readouterr().out


def test_explanation(tiny, tmp_path, capsys):
    command.main(["explanation", *tiny, "--name", "words"])
    found = json.loads((tmp_path / "out" / "words.json").read_text())
    times = found["times"]
    assert found["ratio"] == pytest.approx(times["together"]["median_s"] / times["separately"]["median_s"])
    assert found["words"] > 5 and found["ratio"] < 1
    assert "one by one: ratio" in capsys.readouterr().out


def test_data(tmp_path, capsys):
    arguments = ["--count", "3", "--size", "32", "--workers", "0", "--repeats", "1"]
    command.main(["data", *arguments, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "data.json").read_text())
    speed = found["images_per_s_and_core"]
    assert speed["pillow"] == pytest.approx(3 / found["times"]["pillow"]["median_s"])
    assert found["speed_up"] == pytest.approx(speed["pillow_torchvision"] / speed["pillow"])
    assert found["deviation"]["pillow"] == 0 and found["deviation"]["pillow_torchvision"] < 0.05
    assert found["loader_images_per_s"]["0"] > 0 and "images/s and core" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        command.main(["data", "--images", str(tmp_path), "--output", str(tmp_path)])
    assert leaving.value.code == 2 and "no JPEG there" in capsys.readouterr().err


def test_cache(tiny, tmp_path, capsys):
    command.main(["cache", *tiny, "--scenes", "6", "--batch-size", "4"])
    found = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert found["speed_up"] == pytest.approx(found["steps_per_s"]["memory"] / found["steps_per_s"]["pixels"])
    half = found["half_precision"]
    assert 0.5 < half["same_answer"] <= 1 and set(half["accuracy"]) == {"half", "single"}
    assert 0 < half["largest_logit_difference"] < 0.1
    assert "from pixels" in capsys.readouterr().out


def test_mistakes(tiny, capsys):
    for arguments in (["decoding", "--repeats", "0"], ["flying"], []):
        with pytest.raises(SystemExit) as leaving:
            command.main(arguments)
        assert leaving.value.code == 2
    with pytest.raises(SystemExit) as leaving:
        command.main(["decoding", *tiny, "--checkpoint", "gone.ckpt"])
    assert leaving.value.code == 2 and "gone.ckpt: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["explanation", *tiny, "--method", "magic"])
    assert "unknown method 'magic'" in capsys.readouterr().err
