"""Your own data: manifests in every format, their splits, and everything that can be wrong with them."""

import base64
import csv
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from clipmapper.data.readers.huggingface import huggingface_data, records_of
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.records import Record
from clipmapper.data.tables.whole import split_by_image
from clipmapper.errors import UserError, UserErrors


def picture(number: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def rows(count: int = 12, **more) -> list[dict]:
    """Two questions about each of ``count`` images."""
    return [
        {"image": f"{n}.png", "question": f"{what} {n}?", "answers": [answer], **more}
        for n in range(count)
        for what, answer in (("is it", "yes" if n % 2 else "no"), ("what colour is", "the blue."))
    ]


def lines(path: Path, entries: list) -> str:
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n")
    return str(path)


def told(path: str, **settings) -> list[str]:
    with pytest.raises(UserErrors) as error:
        manifest_data(path, **settings)
    return error.value.lines


# What is read


def test_json_lines(folder):
    entries = rows()
    entries[0] |= {"id": 7, "family": "yes/no", "answers": ["yes"] * 9 + ["no"], "note": "not read"}
    entries[1] |= {"answer": 2}
    del entries[1]["answers"]
    data = manifest_data(lines(folder / "my.jsonl", entries))
    found = {record.id: record for some in data.splits.values() for record in some}
    assert len(found) == 24 and data.kind == "questions"
    first = found[7]
    assert first.image == folder / "0.png" and first.question == "is it 0?" and first.family == "yes/no"
    assert first.answers == ("yes",) * 9 + ("no",) and first.source == f"{folder / 'my.jsonl'}:1"
    assert found["my.jsonl:2"].answers == ("2",) and found["my.jsonl:3"].family == "other"
    assert set(data.answers) <= {"yes", "no", "blue", "2"} and data.families == tuple(sorted(data.families))


def test_splits_are_made_by_image_and_stay_with_the_seed(folder):
    path = lines(folder / "my.jsonl", rows())
    data = manifest_data(path, validation_share=0.3)
    train, held = ({record.image_id for record in data.splits[name]} for name in ("train", "validation"))
    assert not train & held and len(train | held) == 12 and held
    assert len(data.train) == 2 * len(train)
    again = manifest_data(path, validation_share=0.3)
    assert [r.id for r in again.validation] == [r.id for r in data.validation]
    others = [manifest_data(path, validation_share=0.3, split_seed=seed) for seed in range(1, 4)]
    assert any({r.image_id for r in other.validation} != held for other in others)
    assert any("drawn by data.split_seed=0" in note for note in data.notes)


def test_drawn_splits_stay_when_the_data_are_moved_or_named_in_another_way(
    folder, tmp_path_factory, monkeypatch
):
    path = lines(folder / "my.jsonl", rows())
    sides = [record.id for record in manifest_data(path, validation_share=0.3).validation]
    moved = tmp_path_factory.mktemp("else") / "where" / "my.jsonl"
    shutil.copytree(folder, moved.parent)
    assert [record.id for record in manifest_data(str(moved), validation_share=0.3).validation] == sides
    monkeypatch.chdir(moved.parent)
    for name in ("my.jsonl", "../where/my.jsonl"):
        assert [record.id for record in manifest_data(name, validation_share=0.3).validation] == sides


def test_an_image_stays_on_its_side_when_others_come():
    records = [Record(n, b"", f"image {n}", "q", ("a",)) for n in range(400)]
    train, held = split_by_image(records, 0.2, seed=0)
    assert 50 < len(held) < 110 and len(train) + len(held) == 400
    _, fewer = split_by_image(records[:200], 0.2, seed=0)
    assert [r.id for r in fewer] == [r.id for r in held if r.id < 200]
    for count in (2, 3):
        train, held = split_by_image(records[:count], 1e-9, seed=0)
        assert len(held) == 1 and len(train) == count - 1


def test_a_split_column_and_several_files(folder):
    entries = [row | {"split": ("training", "dev", "test")[n // 8]} for n, row in enumerate(rows())]
    for entry in entries[16:]:
        del entry["answers"]  # nobody gives those of a test
    data = manifest_data(lines(folder / "my.jsonl", entries))
    assert {name: len(some) for name, some in data.splits.items()} == {
        "train": 8, "validation": 8, "test": 8
    }  # fmt: skip
    parts = [[row | {"split": "train"} for row in rows(4)], rows(12)[8:16], rows(12)[16:]]
    files = [lines(folder / f"{n}.jsonl", part) for n, part in enumerate(parts)]
    data = manifest_data(*files)
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [8, 8, 8]
    found = told(files[1], validation_path=files[0])
    assert len(found) == 8
    assert found[0] == f"{files[0]}:1: another split than its file's: 'train' in the file for validation"


def test_csv_with_several_answers(folder):
    with (folder / "my.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answers", "family"])
        table.writerow(["0.png", 'what, "then"?\nsecond line', "red|dark red", ""])
        table.writerow(["1.png", "what?", '["red", "blue | green"]', "colour"])
        table.writerow([])
        table.writerow(["2.png", "what?", "blue", "colour"])
    data = manifest_data(str(folder / "my.csv"))
    found = {r.image.name: r for some in data.splits.values() for r in some}
    assert found["0.png"].answers == ("red", "dark red") and found["0.png"].family == "other"
    assert found["0.png"].question == 'what, "then"?\nsecond line'
    assert found["1.png"].answers == ("red", "blue | green") and found["1.png"].source.endswith("my.csv:4")
    assert found["2.png"].source.endswith("my.csv:6")


def test_parquet_with_bytes_and_base64_in_json(folder):
    table = pyarrow.table({
        "image": [{"bytes": picture(n), "path": None} for n in range(4)],
        "question": [f"q{n}?" for n in range(4)],
        "answers": [["red", "blue"], ["red"], ["blue"], ["red"]],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "my.parquet")
    bare = table.set_column(0, "image", pyarrow.array([picture(n) for n in range(4)]))
    pyarrow.parquet.write_table(bare, folder / "bare.parquet")
    encoded = [
        {"image_base64": base64.b64encode(picture(n)).decode(), "question": f"q{n}?", "answer": str(n)}
        for n in range(4)
    ]
    names = ("my.parquet", "bare.parquet")
    for path in [*(str(folder / name) for name in names), lines(folder / "my.jsonl", encoded)]:
        data = manifest_data(path)
        found = [record for some in data.splits.values() for record in some]
        assert len({record.image_id for record in found}) == 4
        assert all(np.asarray(record.pil()).shape == (8, 12, 3) for record in found)
        number = int(found[0].question[1])
        assert np.asarray(found[0].pil())[0, 0].tolist() == [number, 100, 200]


def test_captions_of_an_image_come_together(folder):
    entries = [
        {"image": f"{n}.png", "id": n, "caption": f"caption {k} of {n}"} for k in range(2) for n in range(5)
    ]
    entries.append({"image": "5.png", "captions": ["one", "two", "three"]})
    data = manifest_data(lines(folder / "my.jsonl", entries))
    assert data.kind == "captions"
    found = {r.image.name: r for some in data.splits.values() for r in some}
    assert len(found) == 6 and sum(map(len, data.splits.values())) == 6
    assert found["3.png"].captions == ("caption 0 of 3", "caption 1 of 3")
    assert found["5.png"].captions == ("one", "two", "three")


def test_an_image_with_captions_is_in_one_family(folder):
    entries = [
        {"image": f"{n}.png", "caption": f"no. {k}", "family": "in"} for k in range(2) for n in range(5)
    ]
    entries[7]["family"] = "out"
    path = lines(folder / "my.jsonl", entries)
    assert told(path) == [f"{path}:8: another family than the image's: 'out', but 'in' on {path}:3"]


def test_an_id_may_come_again_in_another_split_alone(folder):
    """As COCO's and nocaps' numbers do, and those of the lines of two files of one name."""
    (folder / "other").mkdir()
    entries = [row | {"image": str(folder / row["image"])} for row in rows()]
    files = [lines(folder / "my.jsonl", entries[:16]), lines(folder / "other" / "my.jsonl", entries[16:])]
    data = manifest_data(files[0], validation_path=files[1])
    assert {name: len(some) for name, some in data.splits.items()} == {"train": 16, "validation": 8}
    numbered = [
        row | {"id": 1, "split": split}
        for row, split in zip(rows()[:3], ("train", "test", "train"), strict=True)
    ]
    path = lines(folder / "numbered.jsonl", numbered)
    assert told(path) == [f"{path}:3: the same id twice: 1 is that of {path}:1 too"]


def test_a_folder_and_an_object_of_hugging_face(folder):
    columns = {
        "image": [{"bytes": picture(n), "path": None} for n in range(6)],
        "question": [f"q{n}?" for n in range(6)],
        "answers": [["red"] if n % 2 else ["blue"] for n in range(6)],
    }
    features = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"),
        "answers": datasets.Sequence(datasets.Value("string")),
    })  # fmt: skip
    whole = datasets.Dataset.from_dict(columns, features=features)
    parts = datasets.DatasetDict({"train": whole.select(range(4)), "val": whole.select([4, 5])})
    parts.save_to_disk(str(folder / "saved"))
    for data in (huggingface_data(str(folder / "saved")), records_of(parts, name="mine")):
        assert [r.question for r in data.train] == ["q0?", "q1?", "q2?", "q3?"]
        assert [r.answers for r in data.validation] == [("blue",), ("red",)]
        assert np.asarray(data.validation[1].pil())[0, 0].tolist() == [5, 100, 200]
    assert data.train[2].source == "mine[train]:row 3"
    assert {len(some) for some in records_of(whole).splits.values()} <= {1, 2, 3, 4, 5}
    for wrong, says in ((whole.remove_columns("image"), "no column image"), (whole, "")):
        if says:
            with pytest.raises(UserError, match=says):
                records_of(wrong)
    with pytest.raises(UserError, match="'extra' is not one of train"):
        records_of(datasets.DatasetDict({"extra": whole}))
    with pytest.raises(UserError, match="not a data set that save_to_disk wrote"):
        huggingface_data(str(folder / "nowhere"))


# What is wrong

MISTAKES = [
    ('{"image": "0.png", "question": "q?", "answers": ["a"]', "not JSON: Expecting"),
    ("[1, 2]", "not an object"),
    (
        {"question": "q?", "answers": ["a"]},
        "no image: give image or image_base64; there is question, answers",
    ),
    ({"image": "none.png", "question": "q?", "answers": ["a"]}, "no such image: "),
    ({"image": "bad.png", "question": "q?", "answers": ["a"]}, "unreadable image: "),
    ({"image": "cut.jpg", "question": "q?", "answers": ["a"]}, "unreadable image: "),
    ({"image": "0.png", "quesiton": "q?"}, "no question and no captions: there is image, quesiton"),
    ({"image": "0.png", "question": " ", "answers": ["a"]}, "empty question"),
    ({"image": "0.png", "question": "q?"}, "no answers: to 'q?'"),
    ({"image": "0.png", "question": "q?", "answers": []}, "no answers: an empty list"),
    ({"image": "0.png", "question": "q?", "answers": [True]}, "answers not text: true"),
    ({"image": "0.png", "question": "q?", "answers": ["a", ""]}, "empty answers"),
    ({"image": "0.png", "question": "q?", "answers": ["a"], "split": "tset"}, "unknown split: 'tset' is not"),
    ({"image": "0.png", "question": "q?", "answers": ["a"], "id": 1}, "the same id twice: 1 is that of "),
    ({"image": "0.png", "question": "q?", "captions": ["a"]}, "a question and captions: "),
    ({"image": "0.png", "captions": ["a", "b"]}, "questions and captions in one data set: captions here"),
    ({"image": ["0.png"], "question": "q?", "answers": ["a"]}, "no image: ['0.png'] is not a path"),
    ({"image": "0.png", "question": "q?", "answers": ["a"], "answer": "a"}, "the same thing twice: both"),
    ({"image_base64": "?", "question": "q?", "answers": ["a"]}, "image_base64 is not base64"),
]

MORE = [
    (
        {"image": "HTTPS://a.b/c.png", "question": "q?", "answers": ["a"]},
        "an address, not a file: 'HTTPS://a.b/c.png'; download the image",
    ),
    ({"image": "0.png", "question": "q?", "answers": {"b": 1}}, "answers not text: {'b': 1}"),
    ({"image": "0.png", "question": "q?", "answers": [float("nan")]}, "answers not text: nan"),
    (
        {"image": "0.png", "captions": ["a", "b"]},
        "questions and captions in one data set: captions here, a question on 24 other lines",
    ),
]


@pytest.fixture
def wrong(folder) -> str:
    (folder / "bad.png").write_bytes(b"no image")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:1500])
    good = [row | {"id": n} for n, row in enumerate(rows())]
    return lines(folder / "wrong.jsonl", [*good, *(line for line, _ in MISTAKES)])


def test_every_mistake_is_one_line_with_file_and_line(wrong):
    found = told(wrong)
    assert len(found) == len(MISTAKES) <= 20
    for number, (line, (_, says)) in enumerate(zip(found, MISTAKES, strict=True), 25):
        assert line.startswith(f"{wrong}:{number}: {says}"), line
        assert "\n" not in line


def test_more_mistakes(folder):
    path = lines(folder / "wrong.jsonl", [*(line for line, _ in MORE), *rows()])
    assert [line.partition(": ")[2] for line in told(path)] == [says for _, says in MORE]


def test_twenty_are_shown_and_the_rest_counted(folder):
    entries = [{"image": "no.png", "question": f"q{n}?"} for n in range(30)]
    entries += [{"image": "0.png", "question": "", "answers": ["a"]}] * 3
    found = told(lines(folder / "my.jsonl", entries))
    assert len(found) == 21 and found[0].endswith("my.jsonl:1: no answers: to 'q0?'")
    assert found[-1] == "and 13 more: 10 x no answers, 3 x empty question"


def test_the_command_says_them_all_with_exit_status_2(wrong, tmp_path, monkeypatch, capsys):
    from clipmapper import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as leaving:
        cli.train(["data=manifest", f"data.path={wrong}", "logger=csv"])
    errors = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2 and len(errors) == len(MISTAKES)
    assert all(line.startswith(f"error: {wrong}:") for line in errors)
    assert not (tmp_path / "outputs").exists()  # nothing has begun


def test_bad_images_are_left_out_and_counted(folder):
    (folder / "3.png").write_bytes(b"no image")
    (folder / "4.png").unlink()
    path = lines(folder / "my.jsonl", rows())
    assert [line.partition(": ")[2].partition(":")[0] for line in told(path)] == [
        "unreadable image", "no such image"
    ]  # fmt: skip
    data = manifest_data(path, on_bad_image="skip")
    assert sum(map(len, data.splits.values())) == 20
    (note,) = [note for note in data.notes if "left out" in note]
    assert note.startswith("2 unreadable images and their 4 records are left out, such as ")
    assert f"{path}:7: unreadable image" in note
    with pytest.raises(UserErrors, match="no image of the train split can be read"):
        manifest_data(lines(folder / "few.jsonl", rows(5)[6:]), on_bad_image="skip")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("my.txt", "", "a manifest is a file .jsonl, .json, .ndjson, .csv, .tsv, .parquet"),
        ("my.jsonl", "\n", "no lines in it"),
        ("my.csv", "image,question,answers\n", "no lines in it"),
        ("my.parquet", "x", "not a readable Parquet file"),
        ("my.jsonl", '{"image": "0.png", "question": "q?", "answer": "a"}\n', "only one image"),
    ],
)
def test_a_file_that_cannot_be_one(folder, name, content, says):
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=says):
        manifest_data(str(folder / name))


def test_mistakes_of_the_whole(folder):
    path = folder / "my.jsonl"
    same = [row | {"answers": ["yes"]} for row in rows()]
    assert "fewer than two different answers in train" in told(lines(path, same))[0]
    assert "data.least_answers" in told(lines(path, rows()), least_answers=100)[0]
    some = [row | {"split": "train"} for row in rows()[:20]] + rows()[20:]
    assert [line.split(": ")[1] for line in told(lines(path, some))] == ["no split"] * 4


def test_records_to_score_alone_need_none_to_train_on(folder):
    """The model says which answers it has."""
    data = manifest_data(lines(folder / "my.jsonl", rows(split="test")))
    assert list(data.splits) == ["test"] and data.kind == "questions" and not data.answers
    assert "nothing to train on: no record is of the split train" in data.notes
    with pytest.raises(UserError, match="data: nothing to train on; the data has test and no train"):
        data.check_training("data")


def test_csv_mistakes(folder):
    (folder / "my.csv").write_text(
        'image,question,answers\n0.png,q?\n1.png,q?,"[1,"\n2.png,q?,a,b\n"3.png" x,q?,a\n'
    )
    found = told(str(folder / "my.csv"))
    assert [line.split(": ")[1] for line in found] == [
        "wrong number of columns", "not a list in JSON", "wrong number of columns", "not CSV"
    ]  # fmt: skip
    assert [line.split(":")[1] for line in found] == ["2", "3", "4", "5"]
    (folder / "my.csv").write_text("image,question,answers,question\n0.png,q?,a,r?\n")
    assert told(str(folder / "my.csv")) == [f"{folder / 'my.csv'}:1: the same column twice: question"]


def test_columns_that_mean_nothing_are_named(folder):
    entries = [row | {"Mask": "m.png", f"extra {n % 12}": n} for n, row in enumerate(rows())]
    notes = manifest_data(lines(folder / "my.jsonl", entries)).notes
    (line,) = (note for note in notes if "not read" in note)
    assert line.startswith("columns that are not read: 'Mask', 'extra 0', ") and line.endswith(" and 3 more")


def test_a_leak_and_unknown_answers_are_said(folder):
    entries = [row | {"split": "train"} for row in rows(6)]
    entries += [{"image": f"{n}.png", "question": "q?", "answer": "a zebra", "split": "val"} for n in (5, 6)]
    notes = manifest_data(lines(folder / "my.jsonl", entries)).notes
    assert "validation: 1 of its 2 images are in train too" in notes
    assert "validation: 2 of 2 questions have no answer among the 3" in notes
