"""Files as people have them: other encodings, types, tables and images than a format asks for."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from clipmapper.data.images import as_pil, ignore_bad_metadata, image_problem
from clipmapper.data.pixels import PixelReader
from clipmapper.data.readers.caption_files import coco_captions_data, flickr_captions_data
from clipmapper.data.readers.conversion import Source, convert
from clipmapper.data.readers.fields import is_list_as_text
from clipmapper.data.readers.huggingface import huggingface_data, records_of
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.readers.rows import decoded_base64, looks_like_base64
from clipmapper.data.readers.vqa_v2 import vqa_v2_data
from clipmapper.data.records import Record, RecordData
from clipmapper.errors import UserError, UserErrors
from clipmapper.host import outputs as hosts
from clipmapper.models.tokens import cut_texts_said_once, warn_of_cut
from clipmapper.settings.schema import WandbLoggerConfig
from clipmapper.training.loggers import check_logger
from clipmapper.visual.layout import picture_name, readable_part

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")


def told(read: Callable[[], object]) -> list[str]:
    """The lines of the mistake that reading ends in."""
    with pytest.raises(UserError) as error:
        read()
    lines = error.value.lines if isinstance(error.value, UserErrors) else [str(error.value)]
    assert all(len(line.splitlines()) == 1 and len(line) < 500 for line in lines)
    return lines


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: object) -> Path:
    """Bytes and texts as they are, all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Official files


def vqa(folder: Path, question: dict | None = None, annotation: dict | None = None, **settings) -> RecordData:
    """Two questions a split; ``question`` and ``annotation`` replace what is in every entry."""
    pair = ("yes", "no")
    for subset in ("train2014", "val2014"):
        for n in range(2):
            write(folder / subset / f"COCO_{subset}_{n:012d}.jpg", encoded(Image.new("RGB", (9, 9)), "JPEG"))
        asked = [{"question_id": n, "image_id": n, "question": f"q{n}"} | (question or {}) for n in range(2)]
        annotated = [
            {"question_id": n, "answers": [{"answer": pair[n]}] * 4, "multiple_choice_answer": pair[n]}
            | (annotation or {})
            for n in range(2)
        ]
        write(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", {"questions": asked})
        write(folder / f"v2_mscoco_{subset}_annotations.json", {"annotations": annotated})
    return vqa_v2_data(str(folder), least_answers=1, **settings)


@pytest.mark.parametrize(
    ("question", "annotation", "says"),
    [
        ({"question": None}, {}, "of 'questions': 'question' is not a text: null"),
        ({"question": []}, {}, "'question' is not a text: []"),
        ({"question": " "}, {}, "'question' is not a text: ' '"),
        ({"question": "\ud800"}, {}, "'question' is not a text: '\\ud800'"),
        ({"image_id": None}, {}, "'image_id' is not a whole number: null"),
        ({"image_id": "x"}, {}, "'image_id' is not a whole number: 'x'"),
        ({"image_id": 0.5}, {}, "'image_id' is not a whole number: 0.5"),
        ({"image_id": True}, {}, "'image_id' is not a whole number: true"),
        ({"image_id": -1}, {}, "'image_id' is not a whole number: -1"),
        ({"image_id": 10**400}, {}, "'image_id' is not a whole number: a number of too many digits"),
        ({}, {"answers": [{"answer": None}]}, "of 'annotations': 'answers' is not a list of answers: "),
        ({}, {"answers": ["a", []]}, "'answers' is not a list of answers: [] among them"),
        ({}, {"answers": NAN}, "'answers' is not a list of answers: nan"),
        ({}, {"answers": "['a', 'b']"}, "'answers' is not a list of answers: a list written as text, "),
        ({}, {"answers": [], "multiple_choice_answer": None}, "no 'answers': and no 'multiple_choice_answ"),
        ({}, {"answer_type": {}}, "'answer_type' is not a text: {}"),
        ({}, {"question_id": None}, "'question_id' is not a whole number: null"),
    ],
)
def test_vqa_v2_says_what_is_there_and_what_is_allowed(tmp_path, question, annotation, says):
    lines = told(lambda: vqa(tmp_path, question, annotation))
    assert len(lines) == 2 and all("_mscoco_train2014_" in line for line in lines)
    assert [f": entry {n} " in line for n, line in enumerate(lines, 1)] == [True, True]
    assert all(says in line for line in lines)


@pytest.mark.parametrize(
    ("question", "annotation", "note"),
    [
        ({"question": 2}, {}, "converted 'question' to a text (2 times)"),
        ({"image_id": "0"}, {}, "converted 'image_id' to a whole number (2 times)"),
        ({"image_id": 1.0}, {}, "converted 'image_id' to a whole number (2 times)"),
        ({}, {"answers": ["yes", 2]}, "converted 'answers' to a list of answers (2 times)"),
        ({}, {"answers": "yes", "multiple_choice_answer": None}, None),
        ({}, {"answers": []}, "converted 'multiple_choice_answer' to the answers that are absent (2 times)"),
        ({}, {"answer_type": 3}, "converted 'answer_type' to a text (2 times)"),
    ],
)
def test_vqa_v2_converts_what_is_unambiguous_and_counts_it(tmp_path, question, annotation, note):
    if note is None:  # every answer is "yes": a vocabulary of one
        assert told(lambda: vqa(tmp_path, question, annotation)) == [
            "data.least_answers=1: 1 answers occur that often"
        ]
        return
    data = vqa(tmp_path, question, annotation)
    assert len(data.train) == 2 and sum(note in line for line in data.notes) == 2  # a file of each split
    assert all(isinstance(answer, str) for record in data.train for answer in record.answers)


def test_official_files_are_right_as_they_are(tmp_path):
    data = vqa(tmp_path)
    assert not any("converted" in note for note in data.notes)
    assert data.train[0].answers == ("yes",) * 4


def coco(folder: Path, caption: object = "c", image: dict | None = None, karpathy: object = None):
    for subset, first in (("train2014", 0), ("val2014", 10)):
        for n in range(2):
            write(folder / subset / f"{n}.jpg", encoded(Image.new("RGB", (9, 9)), "JPEG"))
        write(folder / "annotations" / f"captions_{subset}.json", {
            "images": [{"id": first + n, "file_name": f"{n}.jpg"} | (image or {}) for n in range(2)],
            "annotations": [{"image_id": first + n, "caption": caption} for n in range(2)],
        })  # fmt: skip
    given = [] if karpathy is None else [write(folder / "k.json", karpathy).name]
    return coco_captions_data(str(folder), *given)


@pytest.mark.parametrize("caption", [None, "", [], ["a"], {}, True])
def test_a_caption_that_is_no_text_is_said_once(tmp_path, caption):
    lines = told(lambda: coco(tmp_path, caption))
    assert [line.partition("2014.json: ")[2] for line in lines] == [
        f"entry {n} of 'annotations': 'caption' is not a text: "
        f"{'null' if caption is None else 'true' if caption is True else repr(caption)}"
        for n in (1, 2)
    ]


def test_coco_converts_and_counts(tmp_path):
    data = coco(tmp_path, 2)
    assert data.train[0].captions == ("2",)
    assert "captions_val2014.json: converted 'caption' to a text (2 times)" in data.notes
    assert any("'file_name' is not a text: null" in line for line in told(lambda: coco(tmp_path, "c", {
        "file_name": None
    })))  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"images": None}, "no list 'images' in it (there is null)"),
        ({"pictures": [], "info": {}}, "no list 'images' in it (there is pictures, info)"),
        ([], "no list 'images' in it (it is a list)"),
        ({"images": [{"cocoid": None, "split": "train"}]}, "entry 1 of 'images': 'cocoid' is not a whole nu"),
        ({"images": [{"cocoid": 0}]}, "entry 1 of 'images': no 'split'"),
        ({"images": [{"cocoid": 0, "split": 3}]}, "'split' is not one of train, restval, val, test: '3'"),
        ({"images": [{"cocoid": 0, "split": "train"}] * 2}, "entry 2 of 'images': the same image twice: 0"),
        ({"images": []}, "no image for train"),
    ],
)
def test_the_karpathy_split(tmp_path, content, says):
    lines = told(lambda: coco(tmp_path, karpathy=content))
    assert len(lines) == 1 and "k.json: " in lines[0] and says in lines[0]
    strings = {"images": [{"cocoid": "0", "split": "train"}, {"cocoid": 10, "split": "val"}]}
    assert [record.id for record in coco(tmp_path, karpathy=strings).train] == [0]


ASKED = {"question_id": 5, "image_id": 3, "question": "What?"}
ANNOTATED = {"question_id": 5, "question_type": "one", "answers": [{"answer": "a"}]}
TEXTVQA = {"question_id": 1, "image_id": "x", "question": "q", "answers": ["a"]}
GQA = {"imageId": "n", "question": "q", "answer": "a"}
VIZWIZ = {"image": "x.jpg", "question": "q", "answers": [{"answer": "a"}]}
A_OKVQA = {"image_id": 1, "question_id": "k", "question": "q", "direct_answers": ["a"]}


def converted(folder: Path, name: str, content: object, annotations: object = None) -> tuple[dict, list[str]]:
    """The first line of the manifest, and what was converted."""
    given = None if annotations is None else write(folder / "a.json", annotations)
    source = Source(write(folder / "q.json", content), given, folder)
    convert(name, source, "train", folder / "my.jsonl")
    return json.loads((folder / "my.jsonl").read_text().splitlines()[0]), source.reading.notes("q")


@pytest.mark.parametrize(
    ("name", "content", "annotations", "says"),
    [
        ("ok_vqa", {"questions": [ASKED | {"question": None}]}, {"annotations": [ANNOTATED]},
         "q.json: entry 1 of 'questions': 'question' is not a text: null"),
        ("ok_vqa", {"questions": [ASKED]}, {"annotations": [ANNOTATED | {"answers": [{"answer": None}]}]},
         "a.json: entry 1 of 'annotations': 'answers' is not a list of answers: {'answer': None} among them"),
        ("ok_vqa", {"questions": [ASKED]}, {"annotations": [ANNOTATED | {"answers": None}]},
         "'answers' is not a list of answers: null"),
        ("ok_vqa", {"questions": [ASKED]}, {"annotations": [ANNOTATED | {"question_type": None}]},
         "'question_type' is not a text: null"),
        ("ok_vqa", {"questions": [ASKED]}, {"annotations": [ANNOTATED], "question_types": [1]},
         "'question_types' is not a dictionary of texts but [1]"),
        ("ok_vqa", {"questions": [ASKED], "data_subtype": 3}, {"annotations": [ANNOTATED]},
         "'data_subtype' is not the name of a split but 3"),
        ("ok_vqa", [1], [1], "a.json: no list 'annotations' in it (it is a list)"),
        ("textvqa", {"data": [TEXTVQA | {"answers": [None]}]}, None, "a list of texts: null among them"),
        ("textvqa", {"data": [TEXTVQA | {"answers": "['a', 'b']"}]}, None, "a list written as text, \"['a',"),
        ("textvqa", {"data": [TEXTVQA | {"answers": None}]}, None, "no answers or captions: 1; --split test"),
        ("gqa", {"1": GQA | {"answer": ["a"]}}, None, "q.json: question 1: 'answer' is not a text: ['a']"),
        ("gqa", {"1": GQA | {"types": {"structural": [3]}}}, None, "'structural' is not a text: [3]"),
        ("gqa", [GQA], None, "GQA's questions are a dictionary by question id"),
        ("vizwiz", [VIZWIZ | {"image": None}], None, "q.json: entry 1: 'image' is not a text: null"),
        ("vizwiz", [5], None, "q.json: entry 1: not an object: 5"),
        ("a_okvqa", [A_OKVQA | {"direct_answers": "['a', 'b']"}], None, "a list written as text"),
        ("a_okvqa", [A_OKVQA | {"difficult_direct_answer": "true"}], None, "is not true or false: 'true'"),
        ("easy_vqa", [["q", None, 3]], None, "q.json: entry 1: 'answer' is not a text: null"),
        ("easy_vqa", [["q", "a"]], None, "not [question, answer, image id]: ['q', 'a']"),
        ("nocaps", {"images": [{"id": 1, "file_name": "x"}], "annotations": [
            {"image_id": 1, "caption": None}]}, None, "entry 1 of 'annotations': 'caption' is not a text: n"),
        ("nocaps", {"images": [{"id": None, "file_name": "x"}], "annotations": [
            {"image_id": 1, "caption": "c"}]}, None, "entry 1 of 'images': 'id' is not a whole number: null"),
    ],
)  # fmt: skip
def test_converters_say_one_line_for_one_mistake(tmp_path, name, content, annotations, says):
    (line,) = told(lambda: converted(tmp_path, name, content, annotations))
    assert says in line and not (tmp_path / "my.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "annotations", "column", "value", "note"),
    [
        ("ok_vqa", {"questions": [ASKED | {"image_id": "3"}]}, {"annotations": [ANNOTATED]},
         "image", "COCO_val2014_000000000003.jpg", "'image_id' to a whole number"),
        ("ok_vqa", {"questions": [ASKED]}, {"annotations": [ANNOTATED | {"answers": [{"answer": 2}]}]},
         "answers", ["2"], "'answers' to a list of answers"),
        ("textvqa", {"data": [TEXTVQA | {"answers": "yes"}]}, None,
         "answers", ["yes"], "'answers' to a list of texts"),
        ("gqa", {"1": GQA | {"answer": 2}}, None, "answers", ["2"], "'answer' to a text"),
        ("vizwiz", [VIZWIZ | {"answers": "[unanswerable]"}], None,
         "answers", ["[unanswerable]"], "'answers' to a list of answers"),
        ("a_okvqa", [A_OKVQA | {"direct_answers": "yes"}], None,
         "answers", ["yes"], "'direct_answers' to a list of texts"),
        ("a_okvqa", [A_OKVQA | {"difficult_direct_answer": 1}], None,
         "family", "difficult", "'difficult_direct_answer' to true or false"),
        ("easy_vqa", [["q", 3, "1"]], None, "answers", ["3"], "'answer' to a text"),
        ("nocaps", {"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "caption": 3}]},
         None, "captions", ["3"], "'caption' to a text"),
    ],
)  # fmt: skip
def test_converters_count_what_they_convert(tmp_path, name, content, annotations, column, value, note):
    row, notes = converted(tmp_path, name, content, annotations)
    assert row[column] == value and notes == [f"q: converted {note} (1 times)"]


def test_twenty_are_shown_and_the_rest_counted_by_kind(tmp_path):
    entries = [TEXTVQA | {"question_id": None}] * 30 + [3] * 5
    lines = told(lambda: converted(tmp_path, "textvqa", {"data": entries}))
    assert len(lines) == 21
    assert lines[-1] == "and 15 more: 10 x 'question_id' is not a whole number, 5 x not an object"


# Encodings and tables


@pytest.fixture
def folder(tmp_path) -> Path:
    for n in range(3):
        write(tmp_path / f"{n}.png", encoded(Image.new("RGB", (9, 9), (80 * n, 0, 0))))
    return tmp_path


ONE_HELD = {"validation_share": 1e-9}  # which one depends on where the images lie
ROWS = [{"image": f"{n}.png", "question": f"q{n}?", "answers": ("yes", "no", "2")[n]} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "image,question,answers\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
LATIN = "not UTF-8 text from line 2 on (Latin-1 or another code page, it seems); save it as UTF-8"
KINDS = {
    "UTF-16": "UTF-16 text, not UTF-8; save it as UTF-8",
    "gz": "not a text file, but compressed by gzip; unpack it",
    "html": "not a text file, but an HTML page; a download that failed leaves one",
    "lfs": "not a text file, but a Git LFS pointer; `git lfs pull` fetches the file itself",
    "empty": "no lines in it, the file is empty",
    "nul": "not a text file, there are NUL bytes in it",
    "utf-16 without mark": "UTF-16 text, not UTF-8; save it as UTF-8",
    "utf-32": "UTF-32 text, not UTF-8; save it as UTF-8",
}
BYTES = {
    "UTF-16": LINES.encode("utf-16"),
    "gz": b"\x1f\x8b12",
    "html": b"<!DOCTYPE html><html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid",
    "empty": b"",
    "nul": b'{"a": "\0"}',
    "utf-16 without mark": "image,question\n1.png,какой цвет у этого?\n".encode("utf-16-be"),
    "utf-32": LINES.encode("utf-32"),
}
TOKENS = "".join(f"{n}.png#0\tcaption {n}\n" for n in range(3))


def places(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """Every kind of text file that is read: its name in the folder, and what reads it."""
    official = "v2_OpenEnded_mscoco_train2014_questions.json"
    return {
        "jsonl": ("my.jsonl", lambda: manifest_data(str(folder / "my.jsonl"))),
        "csv": ("my.csv", lambda: manifest_data(str(folder / "my.csv"))),
        "official": (official, lambda: vqa_v2_data(str(folder))),
        "converter": ("q.json", lambda: convert(
            "gqa", Source(folder / "q.json", None, folder), "train", folder / "o.jsonl"
        )),
        "tokens": ("t.txt", lambda: flickr_captions_data(str(folder / "t.txt"), str(folder))),
        "list": ("lists/train.txt", lambda: flickr_captions_data(
            str(write(folder / "t.txt", TOKENS)), str(folder), str(folder / "lists")
        )),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("place", list(places(Path())))
def test_another_kind_of_file_is_one_line(folder, place, kind):
    name, read = places(folder)[place]
    path = write(folder / name, BYTES[kind])
    assert told(read) == [f"{path}: {KINDS[kind]}"]


@pytest.mark.parametrize("place", list(places(Path())))
def test_another_code_page_is_one_line(folder, place):
    name, read = places(folder)[place]
    text = "image,question,answers\ncafé,q,a\n" if name.endswith("csv") else '{"a":\n"é"}\n'
    text = text if place != "jsonl" else LINES.replace("q1", "é").replace("q2", "ü")
    path = write(folder / name, text.encode("latin-1"))
    (line,) = told(read)
    assert line.startswith(str(path)) and line.endswith(LATIN)


@pytest.mark.parametrize("place", list(places(Path())))
def test_a_folder_is_no_file(folder, place):
    name, read = places(folder)[place]
    (folder / name).mkdir(parents=True)
    assert all("a folder, not a file" in line for line in told(read))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", LINES),
        ("mark.jsonl", LINES.encode("utf-8-sig")),
        ("mark in the middle.jsonl", LINES.replace('{"image": "1', '\ufeff{"image": "1')),
        ("cr.jsonl", LINES.replace("\n", "\r")),
        ("list.json", ROWS),
        ("long list.json", json.dumps(ROWS, indent=1)),
        ("list.jsonl", ROWS),
        ("inside.json", {"data": ROWS}),
        ("plain.csv", TABLE),
        ("mark.csv", TABLE.encode("utf-8-sig")),
        ("cr.csv", TABLE.replace("\n", "\r")),
        ("crlf.csv", TABLE.replace("\n", "\r\n")),
        ("semicolons.csv", TABLE.replace(",", ";")),
        ("tabs.csv", TABLE.replace(",", "\t")),
        ("tabs.tsv", TABLE.replace(",", "\t")),
        ("commas.tsv", TABLE),
        ("excel.csv", "\ufeffsep=;\r\n" + TABLE.replace(",", ";").replace("\n", "\r\n")),
    ],
)
def test_manifests_that_say_the_same(folder, name, content):
    data = manifest_data(str(write(folder / name, content)), **ONE_HELD)
    found = {r.question: (r.image, r.answers) for some in data.splits.values() for r in some}
    assert found == {row["question"]: (folder / row["image"], (row["answers"],)) for row in ROWS}


ODD = {"image": "0.png", "question": "z", "answers": "a"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", LINES + json.dumps(ODD | {"answers": NAN}), ":4: no answers: to 'z'"),
        ("a.jsonl", LINES + json.dumps(ODD | {"answers": float("inf")}), ":4: answers not text: inf"),
        ("a.jsonl", LINES + json.dumps(ODD | {"question": None}),
         ":4: no question and no captions: there is image, answers"),
        ("a.jsonl", LINES + '{"image": "0.png", "question": "z", "answers": %s}' % ("1" * 5000),
         ":4: not JSON: a number of too many digits"),
        ("a.jsonl", LINES + json.dumps(ODD | {"question": "a\0"}), ":4: question not text: a NUL character"),
        ("a.jsonl", "[" * 100_000, ":1: not JSON: nested too deeply"),
        ("a.jsonl", LINES[:-10], ":3: not JSON: "),
        ("a.json", json.dumps(ROWS, indent=1)[:-30], "it ends too early, as of a download cut short)"),
        ("a.json", json.dumps(ROWS, indent=1)[:30], "it ends too early, as of a download cut short)"),
        ("a.json", [*ROWS, 1], ":row 4: not an object: 1"),
        ("a.csv", TABLE + "0.png,z,[%s]\n" % ("1" * 5000), ":5: not a list in JSON: a number of too"),
        ("a.csv", TABLE + f"0.png,z,{'[' * 10**5}1\n", ":5: not a list in JSON: nested"),
        ("a.jsonl", LINES + '{"image": "0.png", "image": "1.png"}', ":4: a key twice: 'image' stands twice"),
        ("a.tsv", TABLE.replace(",", "\t") + '0.png\tz\t[{"a": 1, "a": 2}]\n', ":5: a key twice: 'a'"),
        ("a.csv", TABLE + "0.png,z,[NaN]\n", ":5: answers not text: nan"),
        ("a.csv", TABLE + "0.png,z,\"('a', 'b')\"\n", ":5: answers: a list written as text: \"('a', 'b')\""),
        ("a.csv", TABLE + "1.png,q,a\n" * 300 + "0.png,z\0,a\n", ":305: question not text: a NUL"),
        ("a.csv", TABLE.replace("q0?", '"a'), ":2: not CSV: unexpected end of data"),
        ("a.csv", TABLE.replace("question", "qu\u00e9stion").encode("latin-1"), ":1: not UTF-8 text"),
        ("a.jsonl", LINES + json.dumps(ODD | {"answers": "['a' 'b']"}), "answers: a list written as text"),
        ("a.jsonl", LINES + json.dumps(ODD | {"answers": "array(['a'], dtype=object)"}), "a list written as"),
        ("a.jsonl", LINES + json.dumps(ODD | {"answers": [["a"]]}), ":4: answers not text: ['a']"),
        ("a.gz", b"\x1f\x8b12", "a manifest is a file .jsonl, .json, .ndjson, .csv, .tsv, .parquet; this"),
        ("a.xlsx", b"PK\x03\x04", "this is a zip archive (an Excel file is one too)"),
        ("a.parquet", b"PAR1", "not a readable Parquet file (Parquet file size is 4 bytes"),
        ("a.parquet", b"<html>", "not a readable Parquet file (an HTML page"),
        ("a.parquet", b"", "not a readable Parquet file (an empty file)"),
    ],
)  # fmt: skip
def test_one_line_of_a_manifest(folder, name, content, says):
    (line,) = told(lambda: manifest_data(str(write(folder / name, content))))
    assert says in line and line.startswith(str(folder / name))


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        ("mark", TOKENS.encode("utf-8-sig")),
        ("cr", TOKENS.replace("\n", "\r")),
        ("commas", "\ufeffimage,caption\n" + TOKENS.replace("#0\t", ",")),
        ("semicolons", "image;caption\r\n" + TOKENS.replace("#0\t", ";")),
    ],
)
def test_no_image_of_a_token_file_is_lost(folder, layout, content):
    lists = {"train.txt": b"\xef\xbb\xbf0.png\r\n1.png", "val.txt": b"\xef\xbb\xbf2.png\r\n"}
    for name, listed in lists.items():
        write(folder / "lists" / name, listed)
    tokens = write(folder / "t.txt", content)
    data = flickr_captions_data(str(tokens), str(folder), str(folder / "lists"))
    assert {name: [(r.id, r.captions) for r in some] for name, some in data.splits.items()} == {
        "train": [("0.png", ("caption 0",)), ("1.png", ("caption 1",))],
        "validation": [("2.png", ("caption 2",))],
    }


def test_a_caption_may_have_odd_line_separators(folder):
    tokens = write(folder / "t.txt", TOKENS.replace("caption 1", "a\u2028b\x0cc"))
    data = flickr_captions_data(str(tokens), str(folder))
    assert ("a\u2028b\x0cc",) in [r.captions for some in data.splits.values() for r in some]


# Texts where lists are meant, answers, names of classes


@pytest.mark.parametrize("text", [
    '["a"]', "['a' 'b']", "[1, 2]", "[a, b]", "[]", "('a',)", "('a', 'b')", "array(['a'], dtype=object)",
    "[{'answer': 'a'}]", " ['a\nb'] ", "[0.5]",
])  # fmt: skip
def test_lists_as_text(text):
    assert is_list_as_text(text)


@pytest.mark.parametrize("text", ["[unanswerable]", "(a, b)", '("Hello" on a sign)', "a", "", "[x", "f(x)"])
def test_texts_that_are_no_lists(text):
    assert not is_list_as_text(text)


def test_answers_that_are_all_alike_are_normalised_and_counted(folder):
    rows = [row | {"answers": ["Yes"] * 5 if n else ["A dog.", "cat"] * 2} for n, row in enumerate(ROWS)]
    rows += [ODD | {"answers": ["Two Dogs."]}, ODD | {"question": "y", "answers": ["yes"] * 5}]
    rows = [row | {"split": "validation" if row["image"] == "2.png" else "train"} for row in rows]
    path = write(folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = manifest_data(str(path))
    answers = {r.question: r.answers for some in data.splits.values() for r in some}
    assert answers["q1?"] == answers["q2?"] == ("yes",) * 5 and answers["z"] == ("2 dogs",)
    assert answers["q0?"] == ("A dog.", "cat") * 2  # the official rule normalises those that differ
    assert data.accuracy("yes", answers["q1?"]) == 1
    assert "answers: normalised where all of a question were alike, of 3 questions" in data.notes


CLASS = datasets.ClassLabel(names=["no", "yes", "red"])


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (CLASS, [0, 1, 2], [("no",), ("yes",), ("red",)]),
        (datasets.Sequence(CLASS), [[0, 0], [1], [2, 0]], [("no", "no"), ("yes",), ("red", "no")]),
        ([{"answer": CLASS}], [[{"answer": 0}], [{"answer": 1}] * 2, [{"answer": 2}]],
         [("no",), ("yes", "yes"), ("red",)]),
        (datasets.Value("int32"), [0, 1, 2], [("0",), ("1",), ("2",)]),
    ],
)  # fmt: skip
def test_class_labels_have_their_names(folder, feature, values, expected):
    features_ = {"image": datasets.Value("string"), "question": datasets.Value("string"), "answers": feature}
    columns = {
        "image": [str(folder / f"{n}.png") for n in range(3)], "question": ["a", "b", "c"], "answers": values
    }  # fmt: skip
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features_))
    datasets.disable_progress_bars()
    data.to_parquet(str(folder / "my.parquet"))
    data.save_to_disk(str(folder / "saved"))
    manifest, saved = str(folder / "my.parquet"), str(folder / "saved")
    for read in (
        records_of(data, **ONE_HELD), manifest_data(manifest, **ONE_HELD), huggingface_data(saved, **ONE_HELD)
    ):  # fmt: skip
        found = {r.question: r.answers for some in read.splits.values() for r in some}
        assert [found[question] for question in "abc"] == expected


def test_a_label_without_a_name_is_no_answer(folder):
    features_ = {"image": datasets.Value("string"), "question": datasets.Value("string"), "answers": CLASS}
    columns = {"image": [str(folder / "0.png")] * 2, "question": ["a", "b"], "answers": [1, -1]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features_))
    assert told(lambda: records_of(data)) == ["data:row 2: no answers: to 'b'"]


@pytest.mark.parametrize("metadata", [
    b"{", b"[]", b"\xff", b'{"info": {"features": [1]}}',
    b'{"info": {"features": {"answers": {"_type": "ClassLabel", "names": {"0": "a"}}}}}',
])  # fmt: skip
def test_metadata_of_others_are_no_names(folder, metadata):
    columns = {"image": ["0.png", "1.png", "2.png"], "question": ["a", "b", "c"], "answers": [0, 1, 2]}
    table = pyarrow.table(columns).replace_schema_metadata({b"huggingface": metadata})
    pyarrow.parquet.write_table(table, folder / "my.parquet")
    data = manifest_data(str(folder / "my.parquet"), **ONE_HELD)
    assert {r.question: r.answers[0] for some in data.splits.values() for r in some} == {
        "a": "0", "b": "1", "c": "2"
    }  # fmt: skip


# Images

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8))
READERS = {
    decoding: PixelReader(
        {"size": (16, 16), "mode": "RGB", "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic",
         "resize_mode": "shortest", "fill_color": 0}, decoding
    )
    for decoding in ("fast", "exact")
}  # fmt: skip


def readable(content: bytes) -> bool:
    """Whether the image can be read; the check and every reader have to agree on it."""

    def works(read: Callable[[], object]) -> bool:
        try:
            read()
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            return False
        return True

    record = Record("r", content, "r", "q", ("a",))
    found = {works(lambda: as_pil(content)), image_problem(content) is None}
    found |= {works(lambda reader=reader: reader(record)) for reader in READERS.values()}
    assert len(found) == 1, image_problem(content)
    return found.pop()


def exif(*entry: int) -> bytes:
    """EXIF of one entry of twelve bytes."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\1" + bytes(entry) + b"\0\0\0\0"


EXIF = {
    "an entry that is cut": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30,
    "a header that is cut": b"Exif\0\0MM",
    "nonsense": b"Exif\0\0zzzzzzzzzzzz",
    "orientation 9": exif(1, 0x12, 0, 3, 0, 0, 0, 1, 0, 9, 0, 0),
    "orientation as text": exif(1, 0x12, 0, 2, 0, 0, 0, 2, 97, 98, 0, 0),
    "orientation elsewhere": exif(1, 0x12, 0, 5, 0, 0, 0, 1, 0, 0, 0, 64),
    "a table within itself": exif(0x87, 0x69, 0, 4, 0, 0, 0, 1, 0, 0, 0, 8),
}
CHUNKS = {
    "EXIF as text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  10\nzzzz")),
    "text that is not compressed": (b"zTXt", b"key\0\0garbage"),
    "a text bomb": (b"zTXt", b"key\0\0" + zlib.compress(bytes(2**26))),
    "a colour profile": (b"iCCP", b"key\0\x07garbage"),
    "EXIF": (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
    "animation": (b"acTL", b"\0"),
    "density": (b"pHYs", b"\0"),
}


@pytest.mark.parametrize("name", list(EXIF))
def test_exif_that_cannot_be_read_is_ignored(name):
    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(NOISE, kind, exif=EXIF[name])
        assert readable(content) and as_pil(content).size == NOISE.size


def test_exif_that_can_be_read_turns_the_image():
    content = encoded(NOISE, "JPEG", exif=exif(1, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0))
    assert readable(content) and as_pil(content).size == NOISE.size[::-1]


@pytest.mark.parametrize("name", list(CHUNKS))
def test_metadata_of_a_png_that_cannot_be_read_are_ignored(name):
    info = PngImagePlugin.PngInfo()
    info.add(*CHUNKS[name])
    content = encoded(NOISE, pnginfo=info)
    assert readable(content)
    assert np.array_equal(np.asarray(as_pil(content)), np.asarray(NOISE))


def test_pillow_warns_of_no_metadata():
    plain = encoded(NOISE, "JPEG")
    cases = [encoded(NOISE, "JPEG", exif=one) for one in EXIF.values()]
    cases.append(plain[:2] + b"\xff\xe2\0\x10MPF\0" + b"\xff" * 10 + plain[2:])
    with warnings.catch_warnings(record=True) as said:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        ignore_bad_metadata()
        for case in cases:
            as_pil(case)
            image_problem(case)
    assert not said
    assert all(readable(case) for case in cases)  # and where warnings are errors, as here, the image is read


def test_a_jpeg_without_its_metadata_is_the_same_image():
    content = encoded(NOISE.convert("CMYK"), "JPEG", exif=EXIF["an entry that is cut"], comment=b"c" * 99)
    plain = encoded(NOISE.convert("CMYK"), "JPEG")
    assert readable(content) and np.array_equal(np.asarray(as_pil(content)), np.asarray(as_pil(plain)))


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_check_and_readers_agree_on_damaged_files(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    options = {"progressive": True} if kind.startswith("progressive") else {}
    whole = encoded(NOISE, kind.split()[-1], **options)
    assert readable(whole)
    unread = 0
    for place in range(4, len(whole), max(1, len(whole) // 24)):
        flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) * 4 + whole[place + 4 :]
        ended = whole[:place] + b"\xff\xd9" + whole[place + 2 :]
        unread += sum(not readable(damaged) for damaged in (whole[:place], flipped, ended))
    assert unread > 10


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer; `git lfs pull` fetches the"),
        (b"<!DOCTYPE html><html>", "an HTML page; a download that failed leaves one"),
        (b"<svg xmlns='x'>", "an SVG or XML file"),
        (b"", "an empty file"),
        (b"%PDF-1.4", "a PDF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 30, "HEIC; save it as JPEG"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 30, "a video"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript, which is a program"),
        (b'{"error": 1}', "cannot identify image file"),
        (encoded(Image.new("RGB", (1, 5000))), "too slim"),
    ],
)
def test_what_is_no_image_is_said(folder, content, says):
    assert not readable(content)
    (folder / "1.png").write_bytes(content)
    more = "".join(json.dumps(ODD | {"image": f"{n}.png"}) + "\n" for n in (0, 2))
    manifest = str(write(folder / "a.jsonl", LINES + more))
    (line,) = told(lambda: manifest_data(manifest))
    assert line.startswith(f"{manifest}:2: unreadable image: {folder / '1.png'} (") and says in line
    data = manifest_data(manifest, on_bad_image="skip", **ONE_HELD)
    assert sum(map(len, data.splits.values())) == 4
    assert any("1 unreadable images and their 1 records are left out" in note for note in data.notes)


BASE64 = "iVBORw0KGgo" + "A" * 400


@pytest.mark.parametrize("text", [
    BASE64, "/9j/4AAQ" + "A/" * 100, "A" * 9000, "data:image/png;base64,AAAA", f"b'{BASE64}'",
    "iVBORw0KGgo" + "A" * 65 + "\n" + "A" * 76,
])  # fmt: skip
def test_base64_in_the_column_of_paths(folder, text):
    assert looks_like_base64(text)
    manifest = str(write(folder / "a.jsonl", LINES + json.dumps(ODD | {"image": text})))
    (line,) = told(lambda: manifest_data(manifest))
    assert line.startswith(f"{manifest}:4: looks like base64: use image_base64: ") and len(line) < 300


@pytest.mark.parametrize(
    "text", ["a.png", "train/" + "x" * 60 + "/1", "a long name " * 40, "9j/" + "a/" * 40]
)
def test_paths_are_no_base64(text):
    assert not looks_like_base64(text)


def test_base64_is_read_as_it_is_written(folder):
    import base64

    image = (folder / "0.png").read_bytes()
    text = base64.b64encode(image).decode()
    assert (
        decoded_base64(text)
        == decoded_base64(f"b'{text}'")
        == decoded_base64(f"data:x;base64,{text}")
        == image
    )
    manifest = str(
        write(folder / "a.jsonl", LINES + json.dumps({**ODD, "image": None, "image_base64": "!!"}))
    )
    assert ":4: image_base64 is not base64: " in told(lambda: manifest_data(manifest))[0]


def test_a_path_that_no_system_has(folder):
    manifest = str(write(folder / "a.jsonl", LINES + json.dumps(ODD | {"image": "x.y/" * 3000})))
    assert told(lambda: manifest_data(manifest))[0].endswith("(File name too long)")


# Names of pictures


def test_questions_of_any_script_have_pictures_of_their_own():
    texts = [
        "какой цвет?",
        "сколько колец?",
        "这是什么颜色?",
        "有多少个?",
        "?",
        "!",
        "",
        "A",
        "a",
        "é",
        "e\u0301",
    ]
    names = [picture_name("photo", text) for text in texts]
    assert len({name.lower() for name in names}) == len(texts)
    assert names[0].startswith("photo_какой-цвет-") and names[2].startswith("photo_这是什么颜色-")
    assert picture_name("a", "b") != picture_name("a", "b", apart="other answer") != picture_name("a b")
    assert picture_name("a", "b") == picture_name("a", "b")


@given(st.lists(st.text(max_size=200), min_size=1, max_size=3))
def test_names_are_files_anywhere(texts):
    name = picture_name(*texts)
    assert len(name.encode()) <= 255 - len("_attention_rollout_comparison.png")
    assert name == name.lower() or any(c.upper() == c != c.lower() for c in name)
    assert not set(name) & set('/\\:*?"<>|\0\n\t ') and not name.startswith((".", "-"))


@given(st.text(max_size=200), st.integers(0, 60))
def test_the_readable_part_is_as_long_as_it_may_be(text, longest):
    assert len(readable_part(text, longest).encode()) <= longest


# Logging


def served(answer: bytes | None) -> str:
    """The address of a server on this machine; None: it never answers."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        kept = []
        while True:
            connection, _ = listening.accept()
            kept.append(connection)
            if answer is not None:
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "key", "says"),
    [
        ("http://127.0.0.1:9", None, "no API key for http://127.0.0.1:9; give one by `wandb login`"),
        ("http://127.0.0.1:9", "", "no API key for http://127.0.0.1:9; give one by `wandb login`"),
        ("http://127.0.0.1:9", "a" * 40, "no answer from http://127.0.0.1:9 within"),
        ("silent", "a" * 40, "(timed out)"),
        ("nonsense", "a" * 40, "no answer from http://127.0.0.1:"),
        ("not an address", "a" * 40, "W&B's settings can't be used"),
        ("well", "a" * 40, None),
    ],
)
def test_online_without_a_key_or_a_network_is_one_line(tmp_path, monkeypatch, address, key, says):
    servers = {"silent": None, "nonsense": b"\0nonsense\r\n\r\n", "well": b"HTTP/1.1 404 Not Found\r\n\r\n"}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", served(servers[address]) if address in servers else address)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(hosts, "PATIENCE", 0.3 if address == "silent" else 5.0)
    settings = WandbLoggerConfig(
        _target_="lightning.pytorch.loggers.WandbLogger", project="of the test", mode="online"
    )
    try:
        if says is None:
            check_logger(settings)
            return
        (line,) = told(lambda: check_logger(settings))
    finally:
        wandb.teardown()
    assert line.startswith("logger.mode=online: ") and says in line and "logger.mode=offline" in line


# What is said, and where


def test_texts_that_are_cut_are_said_once_with_their_number():
    with pytest.warns(UserWarning) as said, cut_texts_said_once():
        for number in range(1000):
            warn_of_cut("text", f"a long text {number}", 90, 77)
            warn_of_cut("text", f"a long text {number}", 90, 77)  # once for each epoch
    lines = [str(warning.message) for warning in said]
    assert len(lines) == 2
    assert lines[0].startswith("text of 90 tokens is cut to the 77") and "'a long text 0'" in lines[0]
    assert lines[1] == "1000 different texts were longer than the context"


def test_texts_that_workers_cut_are_counted_too():
    with pytest.warns(UserWarning) as said, cut_texts_said_once() as counted:
        warn_of_cut("caption", "the first", 90, 77)
        for number in range(2):
            child = os.fork()
            if child == 0:
                warn_of_cut("caption", f"of worker {number}", 90, 77)
                os._exit(0)
            os.waitpid(child, 0)
    assert counted.count == 3 and len(said) == 2


def test_one_text_alone_and_other_processes_are_not_counted_aloud():
    with pytest.warns(UserWarning) as said, cut_texts_said_once():
        warn_of_cut("text", "a", 90, 77)
    assert len(said) == 1
    with cut_texts_said_once(aloud=False):
        warn_of_cut("text", "a", 90, 77)
        warn_of_cut("text", "b", 90, 77)


def test_an_error_is_on_a_line_of_its_own():
    """Behind a progress bar that is not at its end, in a process of its own."""
    program = """
from tqdm import tqdm
from clipmapper.cli import _warn
from clipmapper.commands.mistakes import fail
bar = tqdm(total=9, desc="work")
bar.update(3)
_warn("one\\x1b thing")
bar.update(3)
fail("what went wrong", "and this")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    # As a terminal shows it: what stands behind the last carriage return of a line.
    lines = [line.rpartition("\r")[2] for line in done.stderr.decode().split("\n")]
    assert lines[-3:] == ["error: what went wrong", "error: and this", ""]
    assert "warning: one\\x1b thing" in lines and lines[-4].startswith("work:  67%")
