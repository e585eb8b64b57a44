"""Public data sets: official files made here in their layouts, and the small real ones where they are."""

import gzip
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from support.official_files import coco_folder, flickr_folder, image, save, vqa_v2_folder

from clipmapper.commands.convert import main
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
from clipmapper.data.record import MaskFile
from clipmapper.errors import UserError, UserErrors

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


# What people fine-tune on


def made(
    tmp_path: Path, name: str, *files: Path, split: str = "train", **more
) -> tuple[list[dict], list[str]]:
    """The lines of the manifest, and what else was said."""
    source = Source(files[0], None, tmp_path / "images", more=files[1:], **more)
    convert(name, source, split, tmp_path / "my.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "my.jsonl").read_text().splitlines()]
    return rows, [note.partition(": ")[2] for note in source.notes()]


def refused(tmp_path: Path, name: str, *files: Path, **more) -> str:
    """The one line that is said; nothing is left."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        made(tmp_path, name, *files, **more)
    lines = error.value.lines if isinstance(error.value, UserErrors) else [str(error.value)]
    assert len(lines) == 1 and sorted(tmp_path.rglob("*")) == before, lines
    return lines[0]


def json_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def program(*functions: str, key: str = "function") -> list[dict]:
    return [{"inputs": [], key: name, "value_inputs": []} for name in functions]


CLEVR = {
    "image_index": 0, "program": program("scene", "filter_size", "query_color"), "question_index": 7,
    "image_filename": "CLEVR_val_000000.png", "question_family_index": 2, "split": "val", "answer": "blue",
    "question": "What color is the large thing?",
}  # fmt: skip


def test_clevr(tmp_path):
    ends = ["count", "exist", "equal_integer", "less_than", "greater_than", "equal_color", "query_shape"]
    more = [CLEVR | {"question_index": n, "program": program("scene", end)} for n, end in enumerate(ends)]
    file = save(tmp_path / "q.json", {"info": {"split": "val"}, "questions": [CLEVR, *more]})
    rows, notes = made(tmp_path, "clevr", file, split="validation")
    assert rows[0] == {
        "id": 7, "image": "images/CLEVR_val_000000.png", "question": "What color is the large thing?",
        "family": "query_attribute", "answers": ["blue"], "split": "validation",
    }  # fmt: skip
    assert [row["family"] for row in rows[1:]] == [
        "count", "exist", *["compare_number"] * 3, "compare_attribute", "query_attribute"
    ] and not notes  # fmt: skip
    asked = {key: CLEVR[key] for key in ("image_filename", "question", "question_index")}
    file = save(tmp_path / "q.json", {"questions": [asked]})
    ((row,), _) = made(tmp_path, "clevr", file, split="test")
    assert row["family"] == "other" and "answers" not in row


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question_index": "x"}, "entry 1 of 'questions': 'question_index' is not a whole number: 'x'"),
        ({"answer": ["a"]}, "'answer' is not a text: ['a']"),
        ({"answer": None}, "no answers or captions: 7; --split test"),
        ({"program": "count"}, "'program' is not a list of functions: 'count'"),
        ({"program": [3]}, "entry 1 of 'questions', end of 'program': not an object: 3"),
        ({"program": [{}]}, "end of 'program': no 'function'"),
        ({"image_filename": "../x.png"}, "an image outside the folder of images: "),
    ],
)
def test_clevr_entries_that_are_wrong(tmp_path, change, says):
    file = save(tmp_path / "q.json", {"questions": [CLEVR | change]})
    assert says in refused(tmp_path, "clevr", file)


@pytest.fixture
def clevr_xai(tmp_path) -> Path:
    """In the layout of the release, with masks as it has them (128 x 128) and one that was made in full."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (480, 320)).save(tmp_path / "images" / "CLEVR_unique_000000.png")
    entry = {
        "image_filename": "CLEVR_unique_000000.png", "image": "CLEVR_unique_000000", "split": "unique",
        "question": "Is there a cube?", "program": program("scene", "exist", key="type"),
    }  # fmt: skip
    answers = (True, False, 3, "metal")
    questions = [entry | {"question_index": n, "answer": answer} for n, answer in enumerate(answers)]
    folder = tmp_path / "ground_truth_complex_questions_unique"
    folder.mkdir()
    squashed, full = np.zeros((128, 128), bool), np.zeros((320, 480), bool)
    squashed[32:64, :64] = full[5, 7] = True
    for number, mask in enumerate((squashed, full, squashed)):
        np.save(folder / f"{number}.npy", mask)
    (folder / "stats.json").write_text("{}")
    return save(tmp_path / "CLEVR-XAI_complex_questions.json", {"info": {}, "questions": questions})


def test_clevr_xai(tmp_path, clevr_xai):
    masks = tmp_path / "ground_truth_complex_questions_unique"
    rows, notes = made(tmp_path, "clevr", clevr_xai, split="test", masks=masks)
    assert [row["answers"] for row in rows] == [["yes"], ["no"], ["3"], ["metal"]]
    assert notes == [
        "converted 'answer' to a text (3 times)",
        "2 masks of 128 x 128, brought to the size of their images", "1 questions without a mask",
    ]  # fmt: skip
    assert rows[0]["family"] == "exist" and rows[0]["mask"].startswith("my_masks/") and "mask" not in rows[3]
    assert rows[0]["mask"] == rows[2]["mask"] != rows[1]["mask"]
    squashed, full = (MaskFile(tmp_path / rows[n]["mask"]).mask() for n in (0, 1))
    assert squashed.shape == full.shape == (320, 480) and full.nonzero() == ([5], [7])
    assert squashed[80:160, :240].all() and squashed.sum() == 80 * 240  # of the whole image, squashed
    names = sorted(file.name for file in (tmp_path / "my_masks").iterdir())
    made(tmp_path, "clevr", clevr_xai, split="test", masks=masks)
    assert sorted(file.name for file in (tmp_path / "my_masks").iterdir()) == names and len(names) == 2


def test_clevr_xai_masks_that_are_wrong(tmp_path, clevr_xai):
    masks = tmp_path / "ground_truth_complex_questions_unique"

    def says(content: object, path: Path = masks / "1.npy", folder: Path = masks) -> str:
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        return refused(tmp_path, "clevr", clevr_xai, split="test", masks=folder)

    what = "1.npy has 7 x 9, its image 480 x 320; CLEVR-XAI's own have 128 x 128"
    assert f"a mask of another size than its image: {masks / what}" in says(np.zeros((9, 7), bool))
    assert "1.npy: float64 [320, 480], not true and false" in says(np.zeros((320, 480)))
    assert "1.npy: bool [1, 320, 480], not true and false" in says(np.zeros((1, 320, 480), bool))
    assert "entry 2 of 'questions': not a readable mask: " in says(b"")
    assert "not a readable mask" in says(b"\x93NUMPY\x01\x00\x08\x00{       ")
    assert "not a readable mask" in says(np.array([Exploding()], dtype=object))
    assert "not a readable mask" in says(pickle.dumps({1: Exploding()}))
    one = tmp_path / "ground_truth.npy"
    assert "all masks in one file are a pickle" in says(b"", one, one)
    (masks / "1.npy").unlink()
    assert f"--masks {tmp_path / 'images'}: no mask of any question" in refused(
        tmp_path, "clevr", clevr_xai, split="test", masks=tmp_path / "images"
    )
    assert "no such folder" in refused(tmp_path, "clevr", clevr_xai, split="test", masks=tmp_path / "no")
    (tmp_path / "images" / "CLEVR_unique_000000.png").rename(tmp_path / "images" / "x.png")
    for file in list(masks.glob("*.npy"))[1:]:
        file.unlink()
    assert "no image for its mask: image=" in refused(tmp_path, "clevr", clevr_xai, split="test", masks=masks)
    with pytest.raises(UserError, match=r"--masks .*: gqa has no masks"):
        made(tmp_path, "gqa", clevr_xai, masks=masks)


class Exploding:
    def __reduce__(self):
        return pytest.fail, ("the pickle was read",)


SNLI_VE = {
    "Flickr30K_ID": "3416050480", "annotator_labels": ["neutral"], "captionID": "3416050480.jpg#4",
    "gold_label": "neutral", "pairID": "3416050480.jpg#4r1n", "sentence1": "A person on a horse.",
    "sentence2": "A person is training his horse.",
}  # fmt: skip


def test_snli_ve(tmp_path):
    first = {key: value for key, value in SNLI_VE.items() if key != "Flickr30K_ID"}  # of the first release
    first |= {"Flikr30kID": "3416050480.jpg", "pairID": "3416050480.jpg#4r1e", "gold_label": "entailment"}
    undecided = SNLI_VE | {"gold_label": "-", "pairID": "3416050480.jpg#4r1c"}
    file = json_lines(tmp_path / "snli_ve_dev.jsonl", SNLI_VE, first, undecided)
    rows, notes = made(tmp_path, "snli_ve", file, split="validation")
    assert rows[0] == {
        "id": "3416050480.jpg#4r1n", "image": "images/3416050480.jpg", "family": "neutral",
        "question": "A person is training his horse.", "answers": ["neutral"], "split": "validation",
    }  # fmt: skip
    assert rows[1]["image"] == "images/3416050480.jpg" and rows[1]["answers"] == ["entailment"]
    assert len(rows) == 2 and notes == ["1 pairs left out, without a gold label"]
    assert "nothing in it for --split train (1 pairs left out" in refused(
        tmp_path, "snli_ve", json_lines(file, undecided)
    )


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (SNLI_VE | {"gold_label": "yes"}, "jsonl:1: 'gold_label' is not one of entailment, neutral, contra"),
        (SNLI_VE | {"gold_label": None}, "jsonl:1: 'gold_label' is not a text: null"),
        (SNLI_VE | {"Flickr30K_ID": None}, "jsonl:1: no 'Flickr30K_ID'"),
        (SNLI_VE | {"Flickr30K_ID": "../1"}, "jsonl:1: an image outside the folder of images"),
        (SNLI_VE | {"sentence2": " "}, "jsonl:1: 'sentence2' is not a text: ' '"),
        ("x", "jsonl:1: not an object"),
    ],
)
def test_snli_ve_lines_that_are_wrong(tmp_path, entry, says):
    assert says in refused(tmp_path, "snli_ve", json_lines(tmp_path / "q.jsonl", entry))


def test_snli_ve_files_that_are_wrong(tmp_path):
    file = json_lines(tmp_path / "q.jsonl", SNLI_VE, SNLI_VE, SNLI_VE | {"pairID": "other"})
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UserErrors) as error:
        made(tmp_path, "snli_ve", file)
    assert ["the same id twice" in line or "q.jsonl:3: not JSON" in line for line in error.value.lines] == [
        True, True
    ]  # fmt: skip
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    says = refused(tmp_path, "snli_ve", tmp_path / "q.jsonl.gz")
    assert "SNLI-VE's files are lines of JSON" in says and "gzip; unpack it" in says


VQA_RAD = {
    "qid": 0, "phrase_type": "freeform", "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
    "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e", "image_name": "synpic54610.jpg",
    "image_organ": "HEAD", "evaluation": "not evaluated", "question": "Are regions infarcted?",
    "question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL",
    "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED",
}  # fmt: skip


def test_vqa_rad(tmp_path):
    others = [
        VQA_RAD | {"qid": "1", "phrase_type": "para", "answer_type": "CLOSED "},
        VQA_RAD | {"qid": 2, "phrase_type": "test_freeform", "answer": 4, "answer_type": "OPEN"},
        VQA_RAD | {"qid": 3, "phrase_type": "test_para"},
    ]
    file = save(tmp_path / "VQA_RAD Dataset Public.json", [VQA_RAD, *others])
    rows, notes = made(tmp_path, "vqa_rad", file)
    assert rows[0] == {
        "id": 0, "image": "images/synpic54610.jpg", "question": "Are regions infarcted?",
        "family": "CLOSED", "answers": ["Yes"], "split": "train",
    }  # fmt: skip
    assert [row["family"] for row in rows] == ["CLOSED"] * 2
    converted_one = "converted 'answer' to a text (1 times)"
    assert notes == [converted_one, "2 entries left out, of another split"]
    rows, _ = made(tmp_path, "vqa_rad", file, split="test")
    assert [(row["id"], row["answers"]) for row in rows] == [(2, ["4"]), (3, ["Yes"])]
    (tmp_path / "my.jsonl").unlink()
    assert "nothing in it for --split validation (4 entries left out, of another split)" in refused(
        tmp_path, "vqa_rad", file, split="validation"
    )


SLAKE = {
    "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What modality is used to take this image?",
    "answer": "MRI", "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN",
    "base_type": "vqa", "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 0,
}  # fmt: skip


def test_slake(tmp_path):
    chinese = SLAKE | {"qid": 1, "q_lang": "zh", "question": "图中的扫描方式是什么?", "answer": "磁共振"}
    file = save(tmp_path / "train.json", [SLAKE, chinese])
    ((row,), notes) = made(tmp_path, "slake", file, language="en")
    assert row == {
        "id": 0, "image": "images/xmlab1/source.jpg", "question": SLAKE["question"], "family": "OPEN",
        "answers": ["MRI"], "split": "train",
    }  # fmt: skip
    assert notes == ["1 questions left out, in the other language"]
    ((row,), _) = made(tmp_path, "slake", file, language="zh")
    assert (row["id"], row["answers"]) == (1, ["磁共振"])
    (tmp_path / "my.jsonl").unlink()
    assert "give --language en or zh" in refused(tmp_path, "slake", file)
    assert "--language en: vqa_rad is in one language" in refused(tmp_path, "vqa_rad", file, language="en")


@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("vqa_rad", VQA_RAD | {"phrase_type": None}, "q.json: entry 1: 'phrase_type' is not a text: null"),
        ("vqa_rad", VQA_RAD | {"image_name": "/etc/x.jpg"}, "an image outside the folder of images: /etc/x"),
        ("vqa_rad", VQA_RAD | {"answer": ""}, "q.json: entry 1: 'answer' is not a text: ''"),
        ("slake", SLAKE | {"q_lang": "de"}, "q.json: entry 1: 'q_lang' is not en or zh: 'de'"),
        ("slake", SLAKE | {"img_name": "../../x.jpg"}, "an image outside the folder of images"),
        ("slake", SLAKE | {"qid": None}, "q.json: entry 1: 'qid' is not a whole number or a text: null"),
    ],
)
def test_medical_entries_that_are_wrong(tmp_path, name, entry, says):
    language = {"language": "en"} if name == "slake" else {}
    assert says in refused(tmp_path, name, save(tmp_path / "q.json", [entry]), **language)


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (9, 6), grey).save(file, "PNG" if grey % 2 else "JPEG")
    return file.getvalue()


def path_vqa_part(path: Path, *rows: tuple[object, str | None, str]) -> Path:
    """As ``datasets`` writes it."""
    path.parent.mkdir(exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([{"bytes": content, "path": None} for content, _, _ in rows], kind)
    texts = [pyarrow.array([row[n] for row in rows], pyarrow.string()) for n in (1, 2)]
    parquet.write_table(pyarrow.table([images, *texts], ["image", "question", "answer"]), path)
    return path


def test_path_vqa(tmp_path):
    asked = ((picture(1), "where are the cells located?", "in the canals"), (picture(2), "is it so?", "yes"))
    first = path_vqa_part(tmp_path / "data" / "train-00000-of-00002-41a0f2.parquet", *asked)
    second = path_vqa_part(
        tmp_path / "data" / "train-00001-of-00002-be.parquet", (picture(1), "what?", "bile")
    )
    test = path_vqa_part(tmp_path / "data" / "test-00000-of-00003.parquet", (picture(3), "what?", "liver"))
    rows, notes = made(tmp_path, "path_vqa", first, second)
    assert [row["family"] for row in rows] == ["other", "yes/no", "other"] and not notes
    assert rows[0]["image"] == rows[2]["image"] and "id" not in rows[0]
    assert (tmp_path / rows[0]["image"]).read_bytes() == picture(1) and rows[1]["image"].endswith(".jpg")
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert manifest_data(str(tmp_path / "my.jsonl"), validation_share=1e-9).kind == "questions"
    rows, notes = made(tmp_path, "path_vqa", test, first)
    assert len(rows) == 2 and notes == [
        "1 of 3 files of test were given", "1 of 2 files of train were given",
        "1 entries left out, of another split",
    ]  # fmt: skip
    (tmp_path / "my.jsonl").unlink()
    assert "one of the 2 files is given twice" in refused(tmp_path, "path_vqa", first, first)
    assert f"{second}: textvqa is read from one file" in refused(tmp_path, "textvqa", first, second)


def test_path_vqa_files_that_are_wrong(tmp_path):
    good = (picture(1), "what?", "bile")

    def says(*rows: tuple[object, str | None, str]) -> str:
        return refused(tmp_path, "path_vqa", path_vqa_part(tmp_path / "data" / "a.parquet", good, *rows))

    (tmp_path / "data").mkdir()
    path_vqa_part(tmp_path / "data" / "a.parquet", good)
    assert "a.parquet:row 2: no bytes of an image in 'image': " in says((None, "what?", "bile"))
    assert "a.parquet:row 2: not a readable image: " in says((b"\xff\xd8\xff", "what?", "bile"))
    assert "a.parquet:row 2: no 'question'" in says((picture(2), None, "bile"))
    assert "a.parquet:row 2: 'answer' is not a text: ''" in says((picture(2), "what?", ""))
    for name in ("train_qa.pkl", "train.parquet"):
        (tmp_path / "data" / name).write_bytes(pickle.dumps([Exploding()]))
        line = refused(tmp_path, "path_vqa", tmp_path / "data" / name)
        assert f"{name}: a pickle, which can run any program" in line and "Parquet files" in line
    assert "read from its Parquet files" in refused(tmp_path, "path_vqa", save(tmp_path / "q.json", []))
    assert "no such file" in refused(tmp_path, "path_vqa", tmp_path / "no.parquet")


def test_convert_command_with_several_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    for n, part in enumerate(parts):
        path_vqa_part(Path(part), (picture(n), "what?", "bile"))
    ends = ["--images", "pictures", "--split", "train", "--output", "my.jsonl"]
    main(["path_vqa", *parts, *ends])
    assert capsys.readouterr().out == "my.jsonl: 2 lines about 2 images\n"
    save(Path("train.json"), [SLAKE])
    main(["slake", "train.json", "--language", "en", *ends[:-1], "en.jsonl"])
    assert capsys.readouterr().out == "en.jsonl: 1 lines about 1 images\n"
    for given, says in (
        (["slake", "train.json", "--language", "de", *ends], "--language"),
        (["path_vqa", parts[0], *ends[:1], "train.json", *ends[2:]], "--images train.json: can't be written"),
        (["path_vqa", "train_qa.pkl", *ends], "train_qa.pkl: no such file"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(given)
        error = capsys.readouterr().err
        assert leaving.value.code == 2 and error.count("\n") == 1 and says in error


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"1", b"null", b"{", b"[1]", b"\xff\xfe{", b"PAR1", b"\x80\x04.", b"\x1f\x8b"],
)
@pytest.mark.parametrize("name", ["clevr", "snli_ve", "vqa_rad", "slake", "path_vqa"])
def test_files_that_are_something_else(tmp_path, name, content):
    suffix = {"snli_ve": ".jsonl", "path_vqa": ".parquet"}.get(name, ".json")
    (tmp_path / f"q{suffix}").write_bytes(content)
    language = {"language": "en"} if name == "slake" else {}
    assert f"q{suffix}" in refused(tmp_path, name, tmp_path / f"q{suffix}", **language)


def test_nothing_is_left_of_a_conversion_that_was_interrupted(tmp_path, monkeypatch):
    part = path_vqa_part(tmp_path / "data" / "a.parquet", (picture(1), "what?", "bile"))
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*_) -> None:
        assert len(list((tmp_path / "images").iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("clipmapper.data.readers.conversion.write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, "path_vqa", part)
    assert sorted(tmp_path.rglob("*")) == before
