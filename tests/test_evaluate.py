"""``clipmapper evaluate``: the numbers of training, models compared, evaluations that are stopped."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from support import caption_models, training_models
from support.matching import Matching
from torchmetrics.classification import BinaryCalibrationError

from clipmapper import cli
from clipmapper.commands.evaluate import evaluate, model_names
from clipmapper.commands.train import train
from clipmapper.data.answer_rule import vqa_soft_accuracy
from clipmapper.data.answers import annotators
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.evaluation.captions.ngram_scores import bleu, bleu_counts
from clipmapper.evaluation.statistics import bootstrap_interval, bootstrap_score
from clipmapper.models.exported import write_model
from clipmapper.settings.checks import checked
from clipmapper.settings.commands import EvaluateConfig
from clipmapper.tasks.captioning.evaluation import CaptionEvaluation
from clipmapper.tasks.captioning.samples import caption_samples
from clipmapper.tasks.registry import register_settings
from clipmapper.tasks.vqa.evaluation import AnswerEvaluation, calibration
from clipmapper.tasks.vqa.model import build_clipmapper
from clipmapper.training.evaluated import Forwards
from clipmapper.training.measures import Measure
from clipmapper.training.run_folder import CHECKPOINT

RUN = (
    "encoder.pretrained=null", "data.train_scenes=12", "data.simple_scenes=8", "data.validation_scenes=12",
    "data.held_out_scenes=8", "training.batch_size=8", "training.max_steps=3", "model.width=16",
    "model.depth=1", "model.heads=2", "callbacks=none", "logger=csv",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow")


def evaluated(*overrides: str) -> dict:
    """``results.json`` of ``clipmapper evaluate`` in this process; a mistake raises what it is."""
    from hydra import compose, initialize_config_dir

    from clipmapper.commands.compose import data_settings
    from clipmapper.settings.compose import quoted

    register_settings()
    of_data = [one for one in overrides if one.startswith("data")]
    others = quoted([one for one in overrides if one not in of_data], EvaluateConfig)
    with initialize_config_dir(str(training_models.ROOT / "conf"), version_base="1.3"):
        config = checked(compose("evaluate", others), EvaluateConfig)
    config.data = data_settings(of_data) if of_data else None
    return json.loads((evaluate(config) / "results.json").read_text())


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def trained(architecture, tmp_path_factory):
    """Runs of questions and of captions, each of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    settings = (*RUN, f"encoder.architecture={architecture}", f"output={folder}")
    return {
        "vqa": train(training_models.train_settings(*settings, "training.blind_steps=0")),
        "captioning": train(training_models.train_settings("experiment=caption_scenes", *settings)),
    }


@pytest.fixture(scope="module")
def mine(architecture, tmp_path_factory):
    """A manifest of questions about four images, and two models that share one of their answers."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{colour}.png")
    rows = []
    for number in range(60):
        colour, split = COLOURS[number % 4], ("train", "validation", "test")[number // 20]
        row = {"id": number, "image": f"{colour}.png", "split": split}
        if number % 3:
            row |= {"question": f"what colour is thing {number}?", "family": "colour"}
            answers = [colour] * 6 + [COLOURS[number % 3]] * 4
        else:
            row |= {"question": f"is thing {number} {COLOURS[number % 5 % 4]}?", "family": "yes/no"}
            answers = ["yes" if number % 2 else "no"] * 10
        rows.append(row | ({} if split == "test" else {"answers": answers}))
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    for seed, (name, answers) in enumerate(
        {"a": ("red", "blue", "yes", "no"), "b": ("green", "red")}.items()
    ):
        torch.manual_seed(seed)
        model = build_clipmapper(encoder, training_models.TINY_MAPPER, answers)
        training_models.spread_out(model.encoder.clip, seed)
        torch.nn.init.normal_(model.head.layers[-1].weight, std=2.0)
        torch.nn.init.normal_(model.head.layers[-1].bias)
        write_model(model, folder / name / "model", "")
    return folder


@pytest.fixture
def data(mine):
    return ("data=manifest", f"data.path={mine / 'my.jsonl'}", "data.workers=0")


# The numbers of training


@pytest.mark.parametrize("split", ["validation", pytest.param("held_out", marks=pytest.mark.slow)])
def test_answers_are_scored_as_in_training(trained, tmp_path, split):
    run = json.loads((trained["vqa"] / "results.json").read_text())
    found = evaluated(f"checkpoint={trained['vqa'] / CHECKPOINT}", f"split={split}", f"output={tmp_path}")
    scores = found["models"]["last"]["scores"]
    expected = {family: row[split] for family, row in run["accuracy"].items() if row[split] is not None}
    assert {family: row["accuracy"]["mean"] for family, row in scores.items()} == expected
    assert all(
        row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
        for row in scores.values()
    )
    written = (tmp_path / f"answers_last_{split}.json").read_text()
    assert written == (trained["vqa"] / f"answers_{split}.json").read_text()


@pytest.mark.parametrize("split", ["validation", pytest.param("held_out", marks=pytest.mark.slow)])
def test_captions_are_scored_as_in_training(trained, tmp_path, split):
    run = json.loads((trained["captioning"] / "results.json").read_text())["captions"][split]
    given = f"checkpoint={trained['captioning'] / CHECKPOINT}"
    found = evaluated(given, f"split={split}", f"output={tmp_path}", "batch_size=500")["models"]["last"]
    scores = {name: row["mean"] for name, row in found["scores"]["overall"].items() if name != "samples"}
    expected = {name: run[name] for name in ("cider", "bleu_4", "rouge_l")}
    assert scores == expected | {name: run["greedy"][name] for name in ("correct", "complete")}
    assert found["truth"] == run["greedy"]
    if split == "validation":
        written = (tmp_path / "captions_last_validation.json").read_text()
        assert written == (trained["captioning"] / "captions_validation.json").read_text()


# Own data


@pytest.fixture(scope="module")
def compared(mine, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    given = ("data=manifest", f"data.path={mine / 'my.jsonl'}", "data.workers=0")
    models = f"checkpoint=[{mine / 'a' / 'model'}, {mine / 'b' / 'model'}]"
    return evaluated(models, *given, f"output={output}", "chunk=6", "batch_size=3"), output


def test_several_models_by_hand(mine, compared):
    found, output = compared
    rows = [json.loads(line) for line in (mine / "my.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row["split"] == "validation"]
    assert list(found["models"]) == ["a_model", "b_model"] and found["scored"] == len(asked) == 20
    means = []
    for name, vocabulary in (("a_model", {"red", "blue", "yes", "no"}), ("b_model", {"green", "red"})):
        model = found["models"][name]
        written = json.loads((output / f"answers_{name}_validation.json").read_text())
        assert [entry["question_id"] for entry in written] == [row["id"] for row in asked]
        said = [entry["answer"] for entry in written]
        assert set(said) <= vocabulary
        right = [
            vqa_soft_accuracy(one, annotators(row["answers"])) for one, row in zip(said, asked, strict=True)
        ]
        families = np.array([row["family"] for row in asked])
        mean = {family: np.mean(np.array(right)[families == family]) for family in ("colour", "yes/no")}
        mean["overall"] = np.mean(right)
        assert {f: row["accuracy"]["mean"] for f, row in model["scores"].items()} == pytest.approx(
            mean, abs=1e-7
        )
        assert {f: row["samples"] for f, row in model["scores"].items()} == {
            "colour": 13,
            "yes/no": 7,
            "overall": 20,
        }
        means.append(mean)
        possible = np.array([bool(vocabulary & set(row["answers"])) for row in asked])
        for key, flags in (
            ("no answer that it can give", ~possible),
            ("an answer that it can give", possible),
        ):
            assert model[key]["questions"] == flags.sum() > 0
            assert model[key]["mean"] == pytest.approx(np.mean(np.array(right)[flags]), abs=1e-7)
        assert model["no answer that it can give"]["mean"] == 0
        usual = [Counter(row["answers"]).most_common(1)[0][0] for row in asked]
        wrong = Counter((s, u) for s, u, r in zip(said, usual, right, strict=True) if r < 0.5 and s != u)
        assert {(row["said"], row["for"]): row["times"] for row in model["confusions"]} == wrong
        assert [row["times"] for row in model["confusions"]] == sorted(wrong.values(), reverse=True)
        bins = model["calibration"]["softmax"]["reliability"]
        assert sum(row["questions"] for row in bins) == 20
        assert sum(row["questions"] * row["right"] for row in bins) == pytest.approx(
            sum(r >= 0.5 for r in right)
        )
    assert found["difference_to"] == "a_model" and list(found["differences"]) == ["b_model"]
    for family, row in found["differences"]["b_model"].items():
        expected = means[1][family] - means[0][family]
        assert row["accuracy"]["mean"] == pytest.approx(expected, abs=1e-7)
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]


def test_a_model_differs_from_itself_by_nothing(mine, data, tmp_path, capsys):
    """Though its accuracy has an interval: the differences are paired."""
    (tmp_path / "again").symlink_to(mine / "a" / "model")
    found = evaluated(
        f"checkpoint=[{mine / 'a' / 'model'},{tmp_path / 'again'}]", *data, f"output={tmp_path}/out"
    )
    names = list(found["models"])
    assert len(names) == 2
    for row in found["differences"][names[1]].values():
        assert row["accuracy"] == {"mean": 0, "low": 0, "high": 0}
    interval = found["models"][names[0]]["scores"]["overall"]["accuracy"]
    assert interval["low"] < interval["high"]
    assert "the most frequent mistakes" in capsys.readouterr().out


def test_a_split_without_answers(mine, data, tmp_path, capsys):
    found = evaluated(
        f"checkpoint={mine / 'a' / 'model'}", *data, "split=test", f"output={tmp_path}", "explain=true"
    )
    assert found["scored"] == 0 and "scores" not in found["models"]["model"] and "explanations" not in found
    printed = " ".join(capsys.readouterr().out.split())
    assert "split=test: none of 20 questions have answers of people to score against" in printed
    assert "explain=true: nothing is explained, for explanations are scored by what is right" in printed
    written = json.loads((tmp_path / "answers_model_test.json").read_text())
    assert [entry["question_id"] for entry in written] == list(range(40, 60))


def test_all_splits_and_those_who_have_answers(mine, data, tmp_path, capsys):
    found = evaluated(f"checkpoint={mine / 'a' / 'model'}", *data, "split=all", f"output={tmp_path}")
    assert (found["samples"], found["scored"]) == (60, 40)
    assert "split=all: 40 of 60 questions have answers of people to score against" in capsys.readouterr().out
    assert found["models"]["model"]["scores"]["overall"]["samples"] == 40


def test_a_file_of_test_questions_alone(mine, data, tmp_path):
    rows = [json.loads(line) for line in (mine / "my.jsonl").read_text().splitlines()]
    of_validation = [json.dumps(row | {"split": "test"}) for row in rows if row["split"] == "validation"]
    (mine / "alone.jsonl").write_text("\n".join(of_validation))
    common = (f"checkpoint={mine / 'a' / 'model'}", *data)
    alone = evaluated(*common, f"data.path={mine / 'alone.jsonl'}", "split=test", f"output={tmp_path / 'a'}")
    whole = evaluated(*common, "split=validation", f"output={tmp_path / 'b'}")
    assert alone["models"]["model"]["scores"] == whole["models"]["model"]["scores"]
    with pytest.raises(UserError, match="nothing to train on; the data has test"):
        train(training_models.train_settings("data=manifest", f"data.path={mine / 'alone.jsonl'}"))


@pytest.mark.slow
def test_explanations_are_scored_as_well(mine, data, tmp_path):
    given = ("explain=true", "methods=[random]", "samples=2", f"output={tmp_path}")
    found = evaluated(f"checkpoint={mine / 'a' / 'model'}", *data, *given)
    assert found["explanations"]["model"]["samples"] == 2
    areas = found["explanations"]["model"]["perturbation"]["image"]["positive"]["accuracy"]
    assert set(areas) == {"random"}
    assert (tmp_path / "explanations" / "model" / "pictures" / "methods.png").is_file()


# Stopped and resumed


@pytest.fixture
def counting(monkeypatch):
    """How many questions a model was asked; after ``counting.stop`` batches the user stops it."""

    class Counting:
        asked, batches, stop = 0, 0, None

    original = AnswerEvaluation.said

    def said(self, batch):
        if Counting.batches == Counting.stop:
            raise KeyboardInterrupt
        found = original(self, batch)
        Counting.asked += len(found)
        Counting.batches += 1
        return found

    monkeypatch.setattr(AnswerEvaluation, "said", said)
    return Counting


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on(mine, data, compared, tmp_path, counting):
    models = f"checkpoint=[{mine / 'a' / 'model'}, {mine / 'b' / 'model'}]"
    given = (models, *data, "chunk=6", "batch_size=3", f"output={tmp_path}")
    counting.stop = 5  # of chunks of two batches
    with pytest.raises(
        RunInterrupted, match=r"what is said of 1\d samples is saved in .*: the same command with"
    ):
        evaluated(*given)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "running").exists()
    counting.stop, saved = None, counting.asked - 3
    counting.asked = 0
    found = evaluated(*given)
    assert 0 < counting.asked <= 40 - saved + 3
    for part in ("scored", "differences"):
        assert found[part] == compared[0][part]
    for name, model in found["models"].items():
        assert model["scores"] == compared[0]["models"][name]["scores"]
    counting.asked = 0
    chunk = tmp_path / "chunks" / "a_model" / "chunk_00001.json"
    chunk.write_text(chunk.read_text()[:30])
    evaluated(*given)
    assert counting.asked == len(json.loads(chunk.read_text())["said"])
    counting.asked = 0
    evaluated(*given, "token_precision=float32")
    assert counting.asked == 40  # they depend on it


@pytest.mark.slow
def test_an_evaluation_is_made_anew(mine, data, tmp_path, counting):
    given = (f"checkpoint={mine / 'a' / 'model'}", *data, f"output={tmp_path}")
    first = evaluated(*given)
    again = evaluated(*given, "resume=false")
    assert counting.asked == 40 and again["models"] == first["models"]


@pytest.mark.slow
def test_nothing_saved_is_not_promised(mine, data, tmp_path, counting):
    counting.stop = 0
    with pytest.raises(RunInterrupted, match="nothing was saved: no chunk was finished"):
        evaluated(f"checkpoint={mine / 'a' / 'model'}", *data, f"output={tmp_path}")


@pytest.mark.slow
def test_an_image_that_changed_is_looked_at_again(mine, data, tmp_path, counting):
    given = (f"checkpoint={mine / 'a' / 'model'}", *data, "split=train", f"output={tmp_path}")
    evaluated(*given)
    counting.asked = 0
    os.utime(mine / "red.png", ns=(1, 1))
    evaluated(*given)
    assert counting.asked == 20


@pytest.mark.slow
def test_two_processes_say_what_one_says(mine, data, compared, tmp_path):
    models = f"checkpoint=[{mine / 'a' / 'model'}, {mine / 'b' / 'model'}]"
    given = (models, *data, "chunk=6", "batch_size=3", "devices=2", "accelerator=cpu", "output=out")
    ran = training_models.script("evaluate", *given, folder=tmp_path)
    assert ran.status == 0, ran.errors
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["differences"] == compared[0]["differences"]
    assert ran.printed.count("Written") == 1 and "distributed" not in ran.printed + ran.errors
    for name in ("a_model", "b_model"):
        file = f"answers_{name}_validation.json"
        assert (tmp_path / "out" / file).read_text() == (compared[1] / file).read_text()


# Mistakes


@pytest.mark.slow
def test_mistakes_are_one_line(mine, data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    model, captioner = mine / "a" / "model", trained["captioning"] / CHECKPOINT
    (tmp_path / "captions.jsonl").write_text(
        "\n".join(json.dumps({"image": str(mine / f"{c}.png"), "captions": ["a b"]}) for c in COLOURS)
    )
    captions = ("data=manifest", "data.path=captions.jsonl")
    cases = [
        ((f"checkpoint={model}", *captions), "it answers questions, but these data have captions"),
        ((f"checkpoint={captioner}", *data), "it writes captions, but these data have questions"),
        ((f"checkpoint=[{model},{captioner}]", *data), "models of one task are compared"),
        ((f"checkpoint={model}",), "say which to use, with data=…"),
        (
            (f"checkpoint={model}", *data, "split=held_out"),
            "split=held_out: the data has train, validation, test",
        ),
    ]
    for arguments, says in cases:
        with pytest.raises(SystemExit) as leaving:
            cli.evaluate([*arguments, "output=out"])
        printed = capsys.readouterr().err
        assert leaving.value.code == 2 and says in printed, printed
        assert printed.startswith("error: ") and printed.count("\n") == 1
        assert not list(tmp_path.rglob("out/**/*.json"))


def test_a_task_without_evaluation_says_so():
    with pytest.raises(UserError, match=r"its task \(matching\) has no evaluation"):
        data = training_models.small_scenes()
        Matching().evaluation(torch.nn.Identity(), data, data.validation, Forwards())


# Parts


def test_names_tell_models_apart(tmp_path):
    def named(*paths: str) -> list[str]:
        return model_names([tmp_path / path for path in paths])

    assert named("runs/x/checkpoints/last.ckpt") == ["last"]
    assert named("x/checkpoints/last.ckpt", "x/checkpoints/best.ckpt") == ["last", "best"]
    assert named("x/checkpoints/last.ckpt", "y/checkpoints/last.ckpt") == ["x_last", "y_last"]
    assert named("a b/m.ckpt", "a_b/m.ckpt", "c/n.ckpt") == ["a_b_m", "a_b_m_2", "n"]
    assert named("M.ckpt", "d/m.ckpt") == ["M", "m_2"]
    (tmp_path / "model.v2").mkdir()
    assert named("model.v2") == ["model.v2"]


def test_calibration_is_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    probabilities, right = rng.random(200), rng.random(200) < 0.4
    probabilities[:3] = 1.0, 0.0, 1 / 15
    found = calibration(probabilities, right)
    naive = sum(
        row["questions"] / 200 * abs(row["right"] - row["probability"]) for row in found["reliability"]
    )
    assert found["error"] == pytest.approx(naive, abs=1e-9)
    metric = BinaryCalibrationError(n_bins=15, norm="l1")
    others = probabilities < 1
    metric.update(torch.from_numpy(probabilities[others]), torch.from_numpy(right[others]).long())
    without = calibration(probabilities[others], right[others])["error"]
    assert without == pytest.approx(float(metric.compute()), abs=1e-6)
    assert sum(row["questions"] for row in found["reliability"]) == 200
    assert all(row["from"] <= row["probability"] <= row["to"] for row in found["reliability"])


def test_intervals_of_a_score_that_is_no_mean():
    rng = np.random.default_rng(0)
    values = rng.random((30, 1))
    one, other = bootstrap_score(values, lambda means: means[..., 0]), bootstrap_interval(values[:, 0])
    assert one.as_dict() == pytest.approx(other.as_dict(), abs=1e-12)
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_score(np.empty((0, 2)), lambda means: means[..., 0])
    captions = [["a", "red", "ring"], ["a", "b", "c", "d", "e"], ["a", "big", "blue", "ring", "here"]]
    references = [[["a", "red", "ring", "here"]], [["a", "b", "c", "d", "e"]], [["a", "big", "blue", "ring"]]]
    counts = bleu_counts(captions, references)
    generator = np.random.default_rng(0)
    drawn = [bleu(counts[rows].sum(axis=0))[3] for rows in generator.integers(0, 3, (2000, 3))]
    found = bootstrap_score(counts.astype(float), lambda means: bleu(3 * means)[..., 3])
    assert found.mean == pytest.approx(bleu(counts.sum(axis=0))[3])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-6)


def test_differences_draw_the_same_samples():
    rng = np.random.default_rng(0)
    first = rng.random((50, 1))
    one, other = Measure(float(first.mean()), first), Measure(float(first.mean()) + 0.25, first + 0.25)
    found = other.difference(one, 0.95, 0)
    assert found.as_dict() == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
    assert CaptionEvaluation.titles.keys() > {"cider", "bleu_4", "rouge_l"}


def test_images_of_a_test_split_are_captioned_without_captions_of_people(architecture, tmp_path):
    """In a file of their own, and beside images that have captions; for the upload."""
    rng = np.random.default_rng(1)
    for number in range(4):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    model = caption_models.captioner(architecture)
    write_model(model, tmp_path / "model", "card")
    bare = [{"id": n, "image": f"{n}.png", "split": "test"} for n in (1, 2)]
    bare[0]["captions"] = []
    told = [{"id": n, "image": f"{n}.png", "split": "train", "captions": ["a red disc"]} for n in (0, 3)]
    common = (f"checkpoint={tmp_path / 'model'}", "data=manifest", "split=test")
    for name, rows in (("alone", bare), ("beside", bare + told), ("behind", told + bare)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        found = evaluated(*common, f"data.path={path}", f"output={tmp_path / name}", "data.workers=0")
        assert (found["samples"], found["scored"]) == (2, 0)
        written = json.loads((tmp_path / name / "captions_model_test.json").read_text())
        assert [one["image_id"] for one in written] == [1, 2]
        with pytest.raises(UserError, match="split=test: no image has captions of people"):
            caption_samples(model, manifest_data(str(path)), "test", 2, 0)
    asked = {"image": "0.png", "question": "q?", "answers": ["a"]}
    path.write_text("\n".join(map(json.dumps, [asked | {"split": "train"}] * 3 + bare)))
    with pytest.raises(UserError, match="no question and no captions: other lines ask questions"):
        manifest_data(str(path))
    path.write_text(json.dumps({"image": "0.png", "split": "train"}))
    with pytest.raises(UserError, match="no question and no captions: there is image, split"):
        manifest_data(str(path))
