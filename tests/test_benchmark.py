"""``scripts/benchmark.py``: what it measures is what it says, and it says it in JSON."""

import json
from statistics import median
from time import sleep

import pytest
import torch
from PIL import Image
from support import tiny_models, training_models

from clipmapper.benchmarks import captions, command, naive, perturbation, relevance, subjects
from clipmapper.benchmarks.timing import measured, peak_bytes
from clipmapper.errors import UserError
from clipmapper.relevance import METHODS


def test_ways_take_turns():
    calls = []
    found = measured({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4  # the first of each does not count
    assert len(found["a"]["all_s"]) == 3
    assert found["b"]["fastest_s"] <= found["b"]["median_s"] <= max(found["b"]["all_s"])


def test_what_is_divided_by_runs_right_before():
    calls = []

    def way(name, seconds):
        return lambda: (calls.append(name), sleep(seconds * (1 + len(calls) // 4)))  # ever slower

    found = measured({"a": way("a", 0.005), "b": way("b", 0.02)}, repeats=3, beside="a")
    assert calls == ["a", "b"] + ["a", "a", "b"] * 3
    assert len(found["b"]["beside_s"]) == 3 and found["a"]["time_ratio"] == 1
    its = zip(found["b"]["all_s"], found["b"]["beside_s"], strict=True)
    assert found["b"]["time_ratio"] == median([b / a for b, a in its])
    assert found["b"]["cpu_time_ratio"] >= 0


def test_a_slow_way_is_repeated_less():
    calls = []
    found = measured(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, patience_s=0.0
    )
    assert calls == ["a", "b"] * 2 and len(found["a"]["all_s"]) == 1


def test_peak_memory():
    def work():
        first = torch.zeros(1000, 250)  # a million bytes, and two million more for a while
        torch.cat([first, first]).sum()

    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(3e6, rel=0.01)
    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(3e6, rel=0.01)  # not what was before


# ---------------------------------------------------------------------------------------------------------
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


@pytest.mark.slow
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
    assert speed["exact"] == pytest.approx(3 / found["times"]["exact"]["cpu_median_s"])
    assert found["speed_up"] == pytest.approx(speed["fast"] / speed["open_clip"])
    assert found["deviation"]["exact"]["max"] < 0.01 and 0 < found["deviation"]["fast"]["mean"] < 0.05
    assert found["bytes"]["open_clip"] == 4 * found["bytes"]["fast"]
    assert found["loader_images_per_s"]["0"] > 0 and "levels of 255" in capsys.readouterr().out
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


# ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small_subjects(tmp_path_factory):
    """As those of the benchmark, with models of two layers; weights with which attention has contrast."""
    architecture = tiny_models.clip_config(tmp_path_factory.mktemp("clip"))
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    settings = {
        "width": 16, "heads": 4, "depth": 2, "mlp_ratio": 2.0, "image_position_embedding": False,
        "head_width": 10,
    }  # fmt: skip

    def mapper(kind, batch, device):
        return subjects.mapper(
            kind, subjects.build_mapper(encoder, settings | {"mapper": kind}, answers=5), batch, device
        )

    def random_weights(subject):
        tiny_models.randomise(subject.module, 0)
        return subject

    return {
        "tower": lambda b, d: random_weights(subjects.image_tower("tower", architecture, b, d)),
        "both": lambda b, d: random_weights(subjects.both_towers("both", architecture, b, d)),
        "dual_flow": lambda b, d: random_weights(mapper("dual_flow", b, d)),
        "single_flow": lambda b, d: random_weights(mapper("single_flow", b, d)),
    }


@pytest.mark.parametrize("way", [*relevance.NAIVE])
@pytest.mark.parametrize("name", ["tower", "both", "dual_flow", "single_flow"])
def test_released_programs_give_the_same_relevance(small_subjects, name, way):
    subject = small_subjects[name](3, torch.device("cpu"))
    expected = relevance.explaining_naively(subject, way)()
    found = relevance.explaining(subject, relevance._SAME_AS[way])().streams
    assert found.keys() == expected.keys() and len(found) == (1 if name == "tower" else 2)
    for stream, values in found.items():
        assert values.std() > 0.01
        torch.testing.assert_close(values, expected[stream], rtol=1e-4, atol=1e-6)


def test_released_programs_run_as_many_backwards_as_they_do(small_subjects, monkeypatch):
    subject = small_subjects["tower"](1, torch.device("cpu"))
    count, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: count.append(1) or grad(*a, **k))
    for way, expected in (("one_backward_per_layer", 2), ("three_gradients_per_layer", 6)):
        count.clear()
        relevance.explaining_naively(subject, way)()
        assert len(count) == expected
    count.clear()
    relevance.explaining(subject, "weighted")()
    assert len(count) == 1


def test_attention_written_out_is_put_back():
    before = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), naive.attention_written_out():
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_the_floor_goes_back_to_pixels_and_words(small_subjects):
    for name, leaves in (("tower", 1), ("both", 2), ("dual_flow", 2)):
        found = small_subjects[name](2, torch.device("cpu")).floor()
        assert len(found) == leaves and all(bool(gradient.any()) for gradient in found)


@pytest.mark.slow
def test_relevance(small_subjects, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(relevance, "SUBJECTS", small_subjects)
    monkeypatch.setattr(relevance, "_MODELS", ["tower", "dual_flow"])

    def undefined(trace):
        raise UserError("legrad: not defined for this model")

    monkeypatch.setitem(METHODS, "legrad", undefined)
    arguments = ["relevance", "--repeats", "2", "--batches", "1", "2", "--device", "cpu"]
    command.main([*arguments, "--methods", "weighted", "gae", "legrad", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "relevance.json").read_text())
    rows = {(row["model"], row["batch"], row["way"]): row for row in found["rows"]}
    assert len(rows) == 2 * 2 * 4 + 2 * 2  # the released programs at the smallest batch alone
    assert {(batch, way) for _, batch, way in rows if way in relevance.NAIVE} == {
        (1, way) for way in relevance.NAIVE
    }
    for (model, batch, way), row in rows.items():
        assert ("left_out" in row) == (way == "legrad")
        if "left_out" in row:
            continue
        floor = rows[model, batch, "floor"]
        its = zip(row["all_s"], row["beside_s"], strict=True)
        assert row["time_ratio"] == median([own / other for own, other in its]) and row["runs"] == 2
        if way in relevance.NAIVE:
            assert "memory_ratio" not in row and "peak_bytes" not in row
        else:
            assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / floor["peak_bytes"])
        if way == "three_gradients_per_layer":
            ours = rows[model, batch, "weighted"]
            assert row["times_slower_than_ours"] == pytest.approx(row["median_s"] / ours["median_s"])
    assert (tmp_path / "relevance.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "one_backward_per_layer" in printed and "relevance.png" in printed


@pytest.fixture
def relevance_command(small_subjects, monkeypatch, tmp_path):
    monkeypatch.setattr(relevance, "SUBJECTS", small_subjects)

    def run(*more):
        command.main(
            ["relevance", "--methods", "gae", "--repeats", "1", "--device", "cpu", "--no-naive",
             "--output", str(tmp_path), *more]
        )  # fmt: skip
        return json.loads((tmp_path / "relevance.json").read_text())["rows"]

    return run


def test_under_autocast_it_says_how_far_relevance_is_off(relevance_command, capsys):
    rows = relevance_command("--models", "tower", "--precision", "bfloat16")
    off = {row["way"]: row["deviation"] for row in rows if "deviation" in row}
    assert off.keys() == {"gae"} and 0 < off["gae"] < 0.02
    assert "off float32" in capsys.readouterr().out
    assert all("deviation" not in row for row in relevance_command("--models", "tower"))


@pytest.mark.slow
def test_an_interrupted_benchmark_goes_on(relevance_command, monkeypatch, tmp_path, capsys):
    measure, seen = relevance._measure, []

    def stopping(name, batch, *rest):
        if (name, batch) == ("tower", 2) and not seen.count((name, batch)):
            seen.append((name, batch))
            raise KeyboardInterrupt
        seen.append((name, batch))
        return measure(name, batch, *rest)

    monkeypatch.setattr(relevance, "_measure", stopping)
    with pytest.raises(SystemExit) as leaving:
        relevance_command("--models", "tower", "--batches", "1", "2")
    assert leaving.value.code == 130
    assert "\ninterrupted; the same command with --resume goes on\n" in "\n" + capsys.readouterr().err
    kept = json.loads((tmp_path / "relevance.json").read_text())["rows"]
    assert [(row["batch"], row["way"]) for row in kept] == [(1, "floor"), (1, "gae")]
    seen.clear()
    seen.append(("tower", 2))
    rows = relevance_command("--models", "tower", "--batches", "1", "2", "--resume")
    assert seen[1:] == [("tower", 2)]
    assert rows[:2] == kept and [(row["batch"], row["way"]) for row in rows[2:]] == [(2, "floor"), (2, "gae")]
    # What another call measured stays; a way that is missing is measured beside a floor of the same turns.
    seen.clear()
    seen.append(("tower", 2))
    more = relevance_command("--models", "tower", "--resume", "--methods", "gae", "raw_attention")
    assert seen[1:] == [("tower", 1)] and more[:2] == rows[2:]
    assert [row["way"] for row in more[2:]] == ["floor", "gae", "raw_attention"] and more[2] != rows[0]


def test_a_benchmark_goes_on_only_with_what_it_can_be_compared_to(relevance_command, tmp_path, capsys):
    def refused(*more):
        with pytest.raises(SystemExit) as leaving:
            relevance_command("--models", "tower", "--resume", *more)
        assert leaving.value.code == 2
        return capsys.readouterr().err

    relevance_command("--models", "tower", "--resume")  # nothing there yet
    file = tmp_path / "relevance.json"
    assert "was measured with repeats 1, now it is 2" in refused("--repeats", "2")
    before = file.read_text()
    other = json.loads(before)
    other["machine"]["threads"] = 99
    file.write_text(json.dumps(other))
    assert "was measured with threads 99" in refused()
    for damaged in ("", "[]", '{"rows": 1}', before[:-40]):
        file.write_text(damaged)
        assert "is no result of this benchmark" in refused() and file.read_text() == damaged


def test_ctrl_c_of_a_benchmark_that_cannot_go_on(monkeypatch, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(command.BENCHMARKS, "data", command.BENCHMARKS["data"]._replace(run=stop))
    with pytest.raises(SystemExit) as leaving:
        command.main(["data", "--output", str(tmp_path)])
    assert leaving.value.code == 130 and capsys.readouterr().err == "interrupted; nothing was written\n"


def test_released_programs_that_would_not_fit_are_left_out(small_subjects, monkeypatch, tmp_path):
    trace, _ = small_subjects["tower"](2, torch.device("cpu")).trace()
    # two layers and once the scores, 2 heads, 10 tokens, float32
    assert naive.probability_bytes(trace) == 3 * 2 * 2 * 10 * 10 * 4
    monkeypatch.setattr(relevance, "SUBJECTS", small_subjects)
    monkeypatch.setattr(relevance, "available_bytes", lambda device: 2400)
    command.main(
        ["relevance", "--models", "tower", "--methods", "gae", "--repeats", "1", "--device", "cpu",
         "--output", str(tmp_path)]
    )  # fmt: skip
    rows = json.loads((tmp_path / "relevance.json").read_text())["rows"]
    assert ["left_out" in row for row in rows] == [False, False, True, True]


def test_what_would_not_fit_into_memory_is_left_out(small_subjects, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(relevance, "SUBJECTS", small_subjects)
    monkeypatch.setattr(relevance, "available_bytes", lambda device: 1)
    command.main(
        ["relevance", "--models", "tower", "--methods", "gae", "--batches", "1", "2", "--repeats", "1",
         "--no-naive", "--device", "cpu", "--output", str(tmp_path)]
    )  # fmt: skip
    rows = json.loads((tmp_path / "relevance.json").read_text())["rows"]
    assert ["left_out" in row for row in rows] == [False, False, True, True]
    assert "would take about" in capsys.readouterr().out


@pytest.mark.slow
def test_every_method_can_be_measured(small_subjects):
    subject = small_subjects["tower"](1, torch.device("cpu"))
    for method in ("weighted_token", "weighted_libra", "input_x_gradient"):
        assert relevance.explaining(subject, method)().streams["image"].shape == (1, 10)


def test_perturbation(tmp_path, monkeypatch, capsys):
    architecture = training_models.tiny_clip(tmp_path)
    model = training_models.tiny_model(architecture).requires_grad_(False)
    monkeypatch.setitem(perturbation.MODELS, "scenes", lambda: model)
    command.main(
        ["perturbation", "--samples", "2", "--methods", "2", "--batch-size", "4", "--repeats", "1",
         "--device", "cpu", "--output", str(tmp_path)]
    )  # fmt: skip
    found = json.loads((tmp_path / "perturbation.json").read_text())
    times = found["times"]
    naive_ratio = times["naive loop"]["median_s"] / times["protocol"]["median_s"]
    assert found["times_faster_than_naive"] == pytest.approx(naive_ratio)
    changed = sum(
        row["number"] * times[f"{row['modality']}, {row['kept']} tokens"]["median_s"] / 4
        for row in found["variants"]
    )
    assert found["ratio_to_changed_parts"] == pytest.approx(times["protocol"]["median_s"] / changed)
    assert found["ratio_to_forwards"] < found["ratio_to_changed_parts"]
    # 9 patches: removing 1, 2, 5 (of 4.5), 7 (of 6.75) and all
    kept = sorted(row["kept"] for row in found["variants"] if row["modality"] == "image")
    assert kept == [0, 2, 4, 7, 8]
    assert "different variants" in capsys.readouterr().out
    assert (tmp_path / "perturbation.png").is_file()


def test_the_naive_loop_scores_what_the_protocol_scores(tmp_path):
    from argparse import Namespace

    model = training_models.tiny_model(training_models.tiny_clip(tmp_path)).requires_grad_(False)
    run = perturbation._Run(model, Namespace(samples=3, methods=2, batch_size=8))
    protocol, naive_scores = run.protocol(), run.naive()
    # [methods × modalities × directions × fractions, scores, samples]; image first
    naive_scores = naive_scores.view(2, 2, 2, 9, 2, 3).permute(4, 1, 2, 0, 5, 3).double().numpy()
    assert abs(protocol.values - naive_scores).max() < 1e-5


@pytest.mark.slow
def test_fine_tuning(tmp_path, capsys):
    rows = []
    for number in range(12):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "question": "is it dark?", "answers": ["yes"], "family": "yes/no"},
            {
                "image": f"{number}.png",
                "question": f"number {number}?",
                "answers": ["red"],
                "family": "other",
            },
        ]
    for name, split in (("train", "train"), ("test", "test")):
        text = "".join(json.dumps({**row, "split": split}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    given = ["--data", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    given += ["--output", str(tmp_path / "out"), "--steps", "2", "--held-back", "3", "--questions", "6"]
    given += ["--seeds", "0", "--starts", "init", "--encoders", "frozen", "--augmentations", "crop"]
    command.main(["fine_tuning", *given])
    assert "Accuracy on the test split" in capsys.readouterr().out
    (first,) = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())["rows"]
    assert {*first["accuracy"]} == {"yes/no", "other", "overall"} and first["minutes"] > 0
    assert first["accuracy"]["overall"] == pytest.approx(
        (first["accuracy"]["yes/no"] + first["accuracy"]["other"]) / 2
    )
    command.main(["fine_tuning", *given[:-1], "none", "crop", "--resume"])
    kept, second = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())["rows"]
    assert kept == first and second["augmentation"] == "none"
    parts = (tmp_path / "out" / "fine_tuning_data" / "6.jsonl").read_text().splitlines()
    parts = [json.loads(line) for line in parts]
    assert [row["split"] for row in parts] == ["train"] * 6 + ["validation"] * 6
    images = [{row["image"] for row in parts if row["split"] == split} for split in ("train", "validation")]
    assert not images[0] & images[1] and all(len(one) == 3 for one in images)


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("not json\n", [], "not a manifest in lines of JSON"),
        ('{"image": "a.png"}\n', ["--held-back", "1"], "--held-back 1: --data has 1 images in all"),
    ],
)
def test_fine_tuning_says_what_is_wrong(tmp_path, capsys, text, more, says):
    (tmp_path / "a.jsonl").write_text(text)
    given = ["--data", str(tmp_path / "a.jsonl"), "--test", str(tmp_path / "a.jsonl")]
    with pytest.raises(SystemExit):
        command.main(["fine_tuning", *given, "--output", str(tmp_path / "out"), *more])
    assert says in capsys.readouterr().err
