"""Runs on one's own data from start to finish, and what is explained of photographs."""

import io
import json
import math

import datasets
import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from support import training_models
from support.official_files import coco_folder, flickr_folder, vqa_v2_folder
from support.photographs import photograph, photographs_in, run
from support.slow import mostly_slow

import clipmapper
from clipmapper import cli
from clipmapper.commands.compose import train_settings
from clipmapper.commands.train import train
from clipmapper.data.answer_rule import official_accuracy
from clipmapper.data.images import as_pil, seen_part
from clipmapper.data.readers.conversion import Source, convert
from clipmapper.data.readers.huggingface import records_of
from clipmapper.data.readers.vqa_v2 import annotations_file
from clipmapper.evaluation.captions.scores import score_captions
from clipmapper.training.run_folder import CHECKPOINT, RESULTS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("mine"))


@pytest.fixture(scope="module")
def answering(place):
    more = ("model.width=16", "model.head_width=16", "model.depth=1", "training.blind_steps=2")
    return run(place, "data=manifest", f"data.path={place / 'questions.jsonl'}", "data.workers=2", *more)


@pytest.fixture(scope="module")
def captioning(place):
    more = ("model.width=32", "model.depth=1", "callbacks=relevance", "data.workers=0")
    return run(place, "experiment=caption_manifest", f"data.path={place / 'captions.jsonl'}", *more)


def numbers_of(found) -> list[float]:
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers_of(value)]
    return [found] if isinstance(found, float) else []


def test_questions_from_start_to_finish(answering):
    results = json.loads((answering / RESULTS).read_text())
    assert results["name"] == "manifest" and results["accuracy"]["overall"]["questions"] == 3
    assert set(results["accuracy"]) == {"../what/colour", "overall"}
    row = results["accuracy"]["overall"]
    assert 0 <= row["validation"] <= 1 and 0 <= row["blind"] <= 1 and "held_out" not in row
    for split, ids in (("validation", [14, 15, 16]), ("test", [17])):
        answers = json.loads((answering / f"answers_{split}.json").read_text())
        assert results["answers"][split] == str(answering / f"answers_{split}.json")
        assert [a["question_id"] for a in answers] == ids
        assert {a["answer"] for a in answers} <= {"red", "blue"}  # purple is no question's usual answer
        if split == "validation":
            truth = {14: "blue", 15: "red", 16: "blue"}
            right = np.mean([a["answer"] == truth[a["question_id"]] for a in answers])
            assert row["validation"] == pytest.approx(right, abs=1e-6)
    assert results["explanations"]["localisation"] == {} and results["explanations"]["samples"] == 3
    assert all(map(math.isfinite, numbers_of(results["explanations"])))
    assert len(list((answering / "pictures").glob("explanation_*_what_colour.png"))) == 1


@pytest.mark.slow
def test_captions_from_start_to_finish(captioning):
    results = json.loads((captioning / RESULTS).read_text())
    assert set(results["captions"]) == {"validation"} and results["captions"]["validation"]["cider"] >= 0
    assert results["captions"]["validation"]["greedy"] == {"captions": 3}
    written = json.loads((captioning / "captions_validation.json").read_text())
    assert [entry["image_id"] for entry in written] == [4, 5, 6]
    assert [row["caption"] for row in results["samples"]] == [entry["caption"] for entry in written]
    assert results["explanations"]["localisation"] == {}
    assert len(list((captioning / "pictures").glob("explanation_*_caption.png"))) == 1


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(name: str, *settings: str) -> tuple[int, str, str]:
        status = 0
        try:
            getattr(cli, name)(list(settings))
        except SystemExit as leaving:
            status = leaving.code
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize("task", mostly_slow(["questions", "captions"], ["questions"]))
@pytest.mark.slow
def test_perturb_works_where_the_truth_is_unknown(request, place, command, monkeypatch, task):
    monkeypatch.setattr("clipmapper.commands.perturb._PICTURES", 1)
    folder = request.getfixturevalue({"questions": "answering", "captions": "captioning"}[task])
    few = ("data=manifest", f"data.path={place / task}.jsonl", "methods=[weighted,random]", "samples=2")
    checkpoint = f"checkpoint={folder / CHECKPOINT}"
    status, printed, errors = command("perturb", checkpoint, *few)
    assert status == 0, errors
    assert "Perturbation" in printed and "Localisation" not in printed
    status, _, errors = command("perturb", checkpoint, "split=held_out", *few)
    assert (status, errors) == (2, "error: split=held_out: the data has train, validation, test\n")
    if task == "questions":
        status, _, errors = command("perturb", checkpoint, "split=test", *few)
        assert (status, errors) == (2, "error: split=test: its questions have no answers\n")


def test_the_other_task_is_refused(place, command):
    status, _, errors = command("train", "data=manifest", f"data.path={place / 'captions.jsonl'}")
    assert status == 2 and errors.startswith("error: data: it has captions and no questions, but training")
    wrong = ("experiment=caption_manifest", f"data.path={place / 'questions.jsonl'}")
    status, _, errors = command("train", *wrong)
    assert status == 2 and errors.startswith("error: data: it has questions and no captions, but training")


def test_an_image_that_has_gone_stops_with_its_line(answering, place, command):
    # Checked before the run, gone afterwards: perturb checks again.
    moved = (place / "5.jpg").rename(place / "away.jpg")
    try:
        data = ("data=manifest", f"data.path={place / 'questions.jsonl'}")
        status, _, errors = command("perturb", f"checkpoint={answering / CHECKPOINT}", *data, "samples=3")
    finally:
        moved.rename(place / "5.jpg")
    assert status == 2 and errors.startswith("error: ") and "questions.jsonl:6: no such image: " in errors


# What the model sees of a photograph


class Visual(torch.nn.Module):
    def __init__(self, resize_mode: str) -> None:
        super().__init__()
        self.image_size = (24, 24)
        self.preprocess_cfg = {
            "size": (24, 24), "mode": "RGB", "mean": (0, 0, 0), "std": (1, 1, 1), "fill_color": 0,
            "interpolation": "bicubic", "resize_mode": resize_mode,
        }  # fmt: skip


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(240, 120), (120, 240), (241, 100), (96, 96), (24, 500)])
def test_the_seen_part_lies_where_the_tower_sees_it(resize_mode, size):
    # A smooth picture: what is seen, brought to the tower's size, must equal the tower's own input.
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1]))
    waves = [127 + 120 * np.sin(x + y), 127 + 120 * np.cos(2 * x - y), 127 + 120 * np.sin(x - 2 * y)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    visual = Visual(resize_mode)
    fed = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)(image)
    seen = Image.fromarray(seen_part(image, visual)).resize((24, 24), Image.Resampling.BICUBIC)
    difference = torch.tensor(np.asarray(seen)).permute(2, 0, 1) / 255 - fed
    assert difference.abs().mean() < 0.06
    if resize_mode != "longest":  # nothing but the image, at its own resolution
        assert seen_part(image, visual).shape[0] in (size[1], min(size))


def test_a_photograph_on_its_side_is_seen_upright():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6
    photograph((255, 0, 0)).rotate(90, expand=True).save(buffer, "JPEG", exif=exif, quality=95)
    seen = seen_part(as_pil(buffer.getvalue()), Visual("shortest"))
    assert seen.shape == (40, 40, 3)
    assert seen[5, 5].argmax() == 0 and seen[5, 5, 0] > 200 and seen[35, 35].std() < 10


def test_an_object_in_python_is_trained_on(place, tmp_path):
    rows = [
        {"image": str(place / f"{n}.jpg"), "question": "what colour?", "answer": "red" if n % 2 else "blue"}
        for n in range(6)
    ]
    data = records_of(datasets.Dataset.from_list(rows), name="mine")
    settings = train_settings(
        "data=huggingface", "data.path=mine", "callbacks=none", "logger=csv", "training.max_steps=1",
        "training.warmup_steps=0", "training.batch_size=2", "training.blind_steps=0", "model.width=16",
        "model.depth=1", "model.head_width=16", f"output={tmp_path}", "encoder.pretrained=null",
        f"encoder.architecture={training_models.tiny_clip(tmp_path)}",
    )  # fmt: skip
    folder = train(settings, data=data)
    results = json.loads((folder / RESULTS).read_text())
    assert results["accuracy"]["overall"]["questions"] == len(data.validation)
    assert results["accuracy"]["overall"]["blind"] is None
    assert "data" not in clipmapper.load(folder / CHECKPOINT).description


OFFICIAL = {
    "vqa_v2": (vqa_v2_folder, ("data.test=test-dev2015", "data.least_answers=1", "training.blind_steps=0")),
    "coco_captions": (coco_folder, ()),
    "flickr8k": (flickr_folder, ()),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_from_start_to_finish(name, tmp_path):
    make, more = OFFICIAL[name]
    folder = make(tmp_path / name)
    if name == "flickr8k":
        more = (f"data.tokens={folder / 'captions.txt'}", f"data.images={folder / 'images'}")
        more += ("data.split_files=null", "data.validation_share=0.3")
    else:
        more += (f"data.folder={folder}",)
    small = ("model.width=32", "model.depth=1", "callbacks=none", "data.workers=0")
    done = run(tmp_path, f"data={name}", *more, *small)
    results = json.loads((done / RESULTS).read_text())
    assert results["name"] == name == clipmapper.load(done / CHECKPOINT).description["data"]["name"]
    if name == "vqa_v2":
        assert set(results["accuracy"]) == {"number", "yes/no", "overall"}
        written = json.loads((done / "answers_validation.json").read_text())
        annotations = json.loads(annotations_file(folder, "val2014").read_text())["annotations"]
        official = official_accuracy(written, annotations)
        assert 100 * results["accuracy"]["overall"]["validation"] == pytest.approx(
            official["overall"], abs=0.01
        )
        assert json.loads((done / "answers_test.json").read_text())[0]["question_id"] == 7000
    else:
        written = json.loads((done / "captions_validation.json").read_text())
        assert results["captions"]["validation"]["greedy"]["captions"] == len(written) > 0


def test_nocaps_is_scored_by_domain(place, capsys):
    """Trained on captions of another set with the same numbers, as nocaps is after COCO."""
    domains = ("in-domain", "out-domain", "near-domain")
    content = {
        "licenses": [], "info": {"split": "val"},
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "domain": domains[n % 3], "height": 4}
            for n in range(1, 6)
        ],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "caption": f"A {'red' if n % 2 else 'blue'} corner, no. {k}."}
            for n in range(1, 6)
            for k in range(2)
        ],
    }  # fmt: skip
    (place / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    source = Source(place / "nocaps_val_4500_captions.json", None, place)
    convert("nocaps", source, "validation", place / "nocaps.jsonl")
    told = [json.loads(line) for line in (place / "captions.jsonl").read_text().splitlines()]
    (place / "coco.jsonl").write_text("\n".join(json.dumps(row | {"split": "train"}) for row in told))
    paths = (f"data.path={place / 'coco.jsonl'}", f"data.validation_path={place / 'nocaps.jsonl'}")
    small = ("model.width=32", "model.depth=1", "callbacks=none", "data.workers=0")
    done = run(place, "experiment=caption_manifest", *paths, "name=nocaps", *small)
    found = json.loads((done / RESULTS).read_text())["captions"]["validation"]
    assert list(found["families"]) == sorted(domains)
    written = json.loads((done / "captions_validation.json").read_text())
    for domain, scores in found["families"].items():
        mine = [one for one in written if domains[one["image_id"] % 3] == domain]
        references = [
            [a["caption"] for a in content["annotations"] if a["image_id"] == one["image_id"]] for one in mine
        ]
        wanted = score_captions([one["caption"] for one in mine], references).corpus
        assert scores == {"captions": len(mine)} | {
            k: pytest.approx(wanted[k]) for k in set(scores) - {"captions"}
        }
        assert set(scores) == {"captions", "cider", "bleu_4", "rouge_l"}
    table = capsys.readouterr().out.partition("Greedy captions by family")[2].partition("intervals")[0]
    assert [table.count(name) for name in (*domains, "overall")] == [1] * 4
