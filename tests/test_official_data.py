"""Public data sets: official files made here in their layouts, and the small real ones where they are."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.official_files import coco_folder, flickr_folder, image, save, vqa_v2_folder

from clipmapper.data.answer_rule import (
    direct_answer_accuracy,
    official_accuracy,
    vqa_soft_accuracy,
    write_results,
)
from clipmapper.data.answers import normalised
from clipmapper.data.readers.caption_files import coco_captions_data, flickr_captions_data, read_coco_captions
from clipmapper.data.readers.conversion import Source, convert
from clipmapper.data.readers.manifest import coco_image, manifest_data
from clipmapper.data.readers.vqa_v2 import QuestionFiles, annotations_file, vqa_v2_data
from clipmapper.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


# VQA v2


def test_vqa_v2(tmp_path):
    folder = vqa_v2_folder(tmp_path)
    data = vqa_v2_data(str(folder), test="test-dev2015", least_answers=2)
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [4, 4, 1]
    record = data.validation[0]
    assert record.id == 100_000 and record.image.name == "COCO_val2014_000000000100.jpg"
    assert record.answers == ("2",) * 7 + ("Two.",) * 3 and record.family == "number"
    assert data.answers == ("yes", "2") and data.families == ("number", "yes/no")
    # Ten people said 2; of the other questions three did.
    assert data.vocabulary.targets(record.answers).tolist() == [0, 1]
    assert data.vocabulary.targets(data.train[1].answers).tolist() == pytest.approx([1, 0.9])
    test = data.splits["test"][0]
    assert (test.id, test.answers, test.image.parent.name) == (7000, (), "test2015")
    # Of train and val, as is usual, whatever is trained on: "2" once in either.
    with pytest.raises(UserError, match=r"data\.least_answers=3: 1 answers occur that often"):
        vqa_v2_data(str(folder), least_answers=3)
    both = vqa_v2_data(str(folder), train=["train2014", "val2014"], least_answers=1, targets="three")
    assert len(both.train) == 8 and any("val2014 is trained on" in note for note in both.notes)
    assert both.vocabulary.targets(["2"] * 3 + ["yes"] * 2 + ["x"] * 5).tolist() == [0, 1]


def test_vqa_v2_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"questions\.json: no such file; the questions of train2014"):
        vqa_v2_data(str(tmp_path))
    folder = vqa_v2_folder(tmp_path)
    content = json.loads(annotations_file(folder, "val2014").read_text())
    save(annotations_file(folder, "val2014"), {"annotations": content["annotations"][1:]})
    with pytest.raises(UserError, match=r"a question of .* is not annotated: 100000"):
        vqa_v2_data(str(folder))
    save(annotations_file(folder, "val2014"), {"annotations": [{"question_id": 1}]})
    with pytest.raises(UserError, match="entry 1 of 'annotations': no 'answers'"):
        vqa_v2_data(str(folder))
    save(annotations_file(folder, "val2014"), content)
    coco_image(folder, "val2014", 101).unlink()
    with pytest.raises(UserError, match=r"no such image: .*COCO_val2014_000000000101"):
        vqa_v2_data(str(folder), least_answers=1)


@needs_shared
def test_the_official_accuracy_of_real_questions(tmp_path):
    folder = SHARED / "vqa_v2_subset"
    with gzip.open(folder / "vqa_annotatons_test.json.gz") as file:
        annotations = json.load(file)["annotations"]
    answers = json.loads((folder / "results_test.json").read_text())
    expected = json.loads((folder / "expected_test.json").read_text())
    # Through the file that a run writes.
    path = write_results(tmp_path / "a.json", [(a["question_id"], a["answer"]) for a in answers])
    written = json.loads(path.read_text())
    assert written == answers
    found = official_accuracy(written, annotations)
    assert found["overall"] == expected["accuracy"]["overall"] == 71.20
    assert found["perAnswerType"] == {"yes/no": 77.37, "number": 70.20, "other": 65.74}
    assert found["perAnswerType"] == expected["accuracy"]["perAnswerType"]
    assert found["perQuestionType"] == expected["accuracy"]["perQuestionType"]
    with pytest.raises(UserError, match="wants one answer to each"):
        official_accuracy(written[1:], annotations)


@needs_shared
def test_every_normalised_answer_of_real_questions():
    with gzip.open(SHARED / "vqa_v2_subset" / "normalisation_table.jsonl.gz", "rt") as file:
        table = [json.loads(line) for line in file]
    assert len(table) == 12_112 and sum(raw != done for raw, done in table) == 3329
    assert [(raw, normalised(raw)) for raw, done in table if done and normalised(raw) != done] == []


@needs_shared
def test_real_questions_in_the_official_layout(tmp_path):
    found = SHARED / "vqa_v2_tiny_official_format" / "storage" / "fixtures" / "vqa_v2"
    for subset in ("train2014", "val2014"):
        records = list(QuestionFiles(found).records(subset))
        assert len({record.id for record in records}) == len(records) >= 3
        assert all(len(record.answers) == 10 for record in records)
        assert {record.family for record in records} <= {"yes/no", "number", "other"}
    record = records[0]
    assert (record.question, record.answers[:3]) == ("What color is the wall?", ("red", "red", "orange"))
    tests = [list(QuestionFiles(found).records(subset)) for subset in ("test2015", "test-dev2015")]
    assert len(tests[0]) == len(tests[1]) > 3


# Captions


def test_coco_captions_and_the_karpathy_split(tmp_path):
    folder = coco_folder(tmp_path)
    data = coco_captions_data(str(folder), "dataset_coco.json")
    ids = {name: [record.id for record in some] for name, some in data.splits.items()}
    assert ids == {"train": [0, 1, 10], "validation": [11], "test": [12]} and data.kind == "captions"
    assert data.validation[0].captions == tuple(f"Caption {k} of 11" for k in range(5))
    assert data.train[2].image.is_file()
    official = coco_captions_data(str(folder))
    assert [len(official.splits[name]) for name in ("train", "validation")] == [4, 4]
    save(folder / "dataset_coco.json", {"images": [{"cocoid": 99, "split": "train"}]})
    with pytest.raises(UserError, match="an image that is not in COCO's annotations: 99"):
        coco_captions_data(str(folder), "dataset_coco.json")
    with pytest.raises(UserError, match=r"captions_train2014\.json: no such file; COCO's captions"):
        coco_captions_data(str(tmp_path / "elsewhere"))


@needs_shared
def test_real_captions_in_the_official_layout(tmp_path):
    found = SHARED / "vqa_v2_tiny_official_format" / "storage" / "fixtures"
    place = tmp_path / "annotations" / "captions_val2017.json"
    place.parent.mkdir()
    place.write_bytes((found / "coco_captions_valid.json").read_bytes())
    (record,) = read_coco_captions(tmp_path, "val2017", [])
    assert record.id == 397133 and record.image.name == "000000397133.jpg"
    assert record.captions[0] == "Man in apron standing on front of oven with pans and bakeware"


@pytest.mark.parametrize("layout", ["token", "comma", "bar"])
def test_flickr_token_files(tmp_path, layout):
    flickr_folder(tmp_path, layout)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "Flickr_8k.trainImages.txt").write_text("0.jpg\n1.jpg\n")
    (lists / "val.txt").write_text("2\n")
    settings = (str(tmp_path / "captions.txt"), str(tmp_path / "images"))
    data = flickr_captions_data(*settings, str(lists))
    assert {name: [r.id for r in some] for name, some in data.splits.items()} == {
        "train": ["0.jpg", "1.jpg"], "validation": ["2.jpg"]
    }  # fmt: skip
    assert data.train[0].captions == tuple(f"A man, number {k}, runs ." for k in range(5))
    drawn = flickr_captions_data(*settings)
    assert sum(map(len, drawn.splits.values())) == 4 and len(drawn.splits) == 2
    with (tmp_path / "captions.txt").open("a") as file:
        file.write("5.jpg\n")
    with pytest.raises(UserError, match=r"captions\.txt:\d+: no image and caption: '5\.jpg'"):
        flickr_captions_data(*settings)


# The others, by scripts/convert.py


def converted(tmp_path: Path, name: str, content: object, split: str = "train", **more) -> list[dict]:
    source = Source(save(tmp_path / "q.json", content), more.get("annotations"), tmp_path / "images")
    convert(name, source, split, tmp_path / "out" / "my.jsonl")
    return [json.loads(line) for line in (tmp_path / "out" / "my.jsonl").read_text().splitlines()]


def test_gqa(tmp_path):
    entry = {"imageId": "n12", "question": "Who?", "answer": "man", "types": {"structural": "query"}}
    (row,) = converted(tmp_path, "gqa", {"0042": entry})
    assert row == {
        "id": "0042", "image": "../images/n12.jpg", "question": "Who?", "family": "query",
        "answers": ["man"], "split": "train",
    }  # fmt: skip
    del entry["answer"]
    assert "answers" not in converted(tmp_path, "gqa", {"1": entry}, "test")[0]
    with pytest.raises(UserError, match="question 1: no answers or captions: 1; --split test"):
        converted(tmp_path, "gqa", {"1": entry})
    with pytest.raises(UserError, match="question 1: no 'imageId'"):
        converted(tmp_path, "gqa", {"1": {"question": "Who?"}})


def test_ok_vqa_takes_the_processed_answers(tmp_path):
    answers = [{"answer": "pony tail", "raw_answer": "Pony-Tails", "answer_id": n} for n in range(10)]
    annotations = save(tmp_path / "a.json", {
        "annotations": [{"question_id": 5, "image_id": 3, "question_type": "one", "answers": answers}],
        "question_types": {"one": "Vehicles and Transportation"},
    })  # fmt: skip
    questions = {
        "data_subtype": "train2014",
        "questions": [{"question_id": 5, "image_id": 3, "question": "What?"}],
    }
    (row,) = converted(tmp_path, "ok_vqa", questions, annotations=annotations)
    assert row["answers"] == ["pony tail"] * 10 and row["family"] == "Vehicles and Transportation"
    assert row["image"] == "../images/COCO_train2014_000000000003.jpg"
    with pytest.raises(UserError, match="--annotations"):
        converted(tmp_path, "ok_vqa", questions)


def test_a_okvqa_is_scored_by_its_own_rule(tmp_path):
    entry = {
        "split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What?",
        "choices": ["ramp", "mat"], "correct_choice_idx": 1, "rationales": ["..."],
        "direct_answers": ["ramp"] * 8 + ["chalk"] * 2, "difficult_direct_answer": False,
    }  # fmt: skip
    image(tmp_path / "images" / "000000299207.jpg")
    others = [
        entry | {"question_id": str(n), "image_id": n, "direct_answers": [answer] * 10}
        for n, answer in enumerate(("mat", "grass", "mat"))
    ]
    for other in others:
        image(tmp_path / "images" / f"{other['image_id']:012d}.jpg")
    row = converted(tmp_path, "a_okvqa", [entry, *others])[0]
    assert row["answers"] == ["ramp"] * 8 + ["chalk"] * 2 and row["family"] == "direct"
    path = str(tmp_path / "out" / "my.jsonl")
    data = manifest_data(path, targets="thirds", accuracy="a_okvqa")
    assert data.accuracy("chalk", row["answers"]) == pytest.approx(2 / 3) and "chalk" not in data.answers
    assert vqa_soft_accuracy("chalk", row["answers"]) == pytest.approx(0.6)
    assert direct_answer_accuracy("Two", ["2"] * 3) == 1 and direct_answer_accuracy("x", ["2"]) == 0


def test_vizwiz_answers_without_ids_count_in_full(tmp_path):
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 3
    answers += [{"answer": "laptop", "answer_confidence": "maybe"}] * 7
    entry = {"image": "VizWiz_train_00000001.jpg", "question": "What?", "answers": answers}
    (row,) = converted(tmp_path, "vizwiz", [entry | {"answer_type": "other", "answerable": 1}])
    assert row["id"] == "VizWiz_train_00000001.jpg" and row["family"] == "other"
    assert vqa_soft_accuracy("unanswerable", row["answers"]) == pytest.approx(0.9)
    assert "answers" not in converted(tmp_path, "vizwiz", [entry | {"answers": []}], "test")[0]


def test_textvqa(tmp_path):
    entry = {"question_id": 34602, "image_id": "0054c91397f2fe05", "question": "brand?", "set_name": "train"}
    (row,) = converted(tmp_path, "textvqa", {"data": [entry | {"answers": ["nous les gosses"] * 10}]})
    assert row["image"] == "../images/0054c91397f2fe05.jpg" and row["answers"] == ["nous les gosses"] * 10
    assert "answers" not in converted(tmp_path, "textvqa", {"data": [entry]}, "test")[0]


def test_nocaps(tmp_path):
    content = {
        "images": [{"id": 0, "file_name": "0013ea2087020901.jpg", "domain": "near-domain"}],
        "annotations": [{"id": n, "image_id": 0, "caption": f"A baby {n}."} for n in range(10)],
    }
    (row,) = converted(tmp_path, "nocaps", content, "validation")
    assert row["captions"] == [f"A baby {n}." for n in range(10)] and row["family"] == "near-domain"
    with pytest.raises(UserError, match="no answers or captions"):
        converted(tmp_path, "nocaps", content | {"annotations": []})


@pytest.mark.slow
def test_the_script(tmp_path):
    save(tmp_path / "q.json", [["what color is the shape?", "blue", 3], ["is there a ring?", "no", 3]])
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "easy_vqa", "q.json"]
    command += ["--images", "images", "--split", "train", "--output", "out/my.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "out/my.jsonl: 2 lines about 1 images\n"), done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "my.jsonl").read_text().splitlines()]
    assert [row["family"] for row in rows] == ["other", "yes/no"] and rows[0]["image"] == "../images/3.png"
    assert not any("id" in row for row in rows)  # those of the other split would be the same
    (tmp_path / "q.json").write_text("{")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: q.json: not a readable JSON file")
