"""Records in Arrow columns are the same as a list of records, and what is remembered is what was read."""

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipmapper.data.answers import (
    AnswerVocabulary,
    answer_vocabulary,
    counted_answers,
    frequent_answers,
    unknown_answers,
)
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.record import Record
from clipmapper.data.tables import remembered
from clipmapper.data.tables.builder import as_table
from clipmapper.errors import UserErrors

texts = st.text(st.characters(exclude_categories=()), max_size=8)
said = st.sampled_from(["Yes", "yes.", "no", "2", "two", "the", "A"])
# Fields and not records: the import hook's checks draw random numbers, which a strategy may not.
fields = st.lists(
    st.fixed_dictionaries({
        "id": st.one_of(st.integers(), texts),
        "question": st.none() | texts,
        "answers": st.lists(said, max_size=6).map(tuple),
        "family": texts,
        "captions": st.lists(texts, max_size=2).map(tuple),
        "source": st.one_of(texts, st.sampled_from(["f:1", "f:01", "f:row 12", "f:" + "9" * 20])),
    }),
    max_size=20,
)  # fmt: skip


def records_of(some: list[dict]) -> list[Record]:
    return [Record(image=Path("a.png"), image_id="a.png", **one) for one in some]


@given(fields)
def test_a_table_is_the_list(some):
    some = records_of(some)
    table = as_table(some)
    assert list(table) == some and table == some and len(table) == len(some)
    assert list(table[1::2]) == some[1::2]
    assert list(pickle.loads(pickle.dumps(table))) == some
    assert table.lengths("answers").tolist() == [len(record.answers) for record in some]
    assert table.family_counts() == {
        family: sum(record.family == family for record in some)
        for family in sorted({record.family for record in some})
    }


@given(fields, st.integers(1, 3), st.sampled_from(["soft", "thirds", "three"]))
def test_answers_are_counted_as_one_by_one(some, least, rule):
    some = records_of(some)
    table, counted = as_table(some), [answer for record in some for answer in counted_answers(record.answers)]
    naive = AnswerVocabulary(frequent_answers(counted, least), rule)
    assert answer_vocabulary(table, least, rule).answers == naive.answers
    for vocabulary in (naive, AnswerVocabulary(["yes", "2"], rule)):
        lost = sum(not vocabulary.targets(record.answers).any() for record in some)
        found = unknown_answers(table, vocabulary)
        assert (f"validation: {lost} of {len(some)} questions" in found[0]) if lost else not found


def test_images_in_the_order_in_which_they_come():
    table = as_table([Record(n, b"", image) for n, image in enumerate("bacabd")])
    first, image_of = table.first_of_images()
    assert first.tolist() == [0, 1, 2, 5]
    assert [table[int(first[n])].image_id for n in image_of] == list("bacabd")


@pytest.fixture
def manifest(tmp_path):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    rows = [
        {"image": f"{name}.png", "question": "q?", "answers": [a]}
        for name, a in ["ax", "by", "cx", "ay", "bx"]
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def reads(monkeypatch, path, **settings) -> tuple[int, list]:
    """How often the lines were read, and the records."""
    times = []
    made = remembered._made
    monkeypatch.setattr(remembered, "_made", lambda *given: times.append(1) or made(*given))
    data = manifest_data(str(path), **settings)
    monkeypatch.setattr(remembered, "_made", made)
    return len(times), [*data.train, *data.validation], data.notes


def test_lines_are_read_once_and_again_when_they_changed(manifest, monkeypatch):
    first, naive, _ = reads(monkeypatch, manifest)
    again, found, _ = reads(monkeypatch, manifest)
    assert (first, again) == (1, 0) and found == naive
    os.utime(manifest, ns=(1, 1))
    assert reads(monkeypatch, manifest)[0] == 1
    assert reads(monkeypatch, manifest)[0] == 0
    assert reads(monkeypatch, manifest, images=str(manifest.parent))[0] == 1


@pytest.mark.parametrize("file", ["records.arrow", "images.arrow", "texts.arrow", "table.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"x" + b[-8:]])
def test_a_damaged_table_is_noticed(manifest, monkeypatch, file, damage):
    naive = reads(monkeypatch, manifest)[1]
    target = next((manifest.parent / ".clipmapper").glob(f"*/{file}"))
    target.write_bytes(damage(target.read_bytes()))
    times, found, notes = reads(monkeypatch, manifest)
    assert times == 1 and found == naive and any("read again" in note for note in notes)
    assert reads(monkeypatch, manifest)[0] == 0


def test_images_are_checked_once_and_again_when_they_changed(manifest):
    manifest_data(str(manifest))
    image = manifest.parent / "a.png"
    stat = image.stat()
    image.write_bytes(b"x" * stat.st_size)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    manifest_data(str(manifest))  # the same size and time: not opened
    os.utime(image, ns=(1, 1))
    with pytest.raises(UserErrors, match="unreadable image"):
        manifest_data(str(manifest))
    manifest_data(str(manifest), check="none")
    image.unlink()
    with pytest.raises(UserErrors, match="no such image"):
        manifest_data(str(manifest))


def test_a_folder_that_cannot_be_written(manifest, monkeypatch, tmp_path):
    (manifest.parent / ".clipmapper").write_text("a file")
    monkeypatch.setattr(remembered.platformdirs, "user_cache_dir", lambda *a, **k: str(tmp_path / "cache"))
    assert any("is remembered in" in note for note in reads(monkeypatch, manifest)[2])
    assert reads(monkeypatch, manifest)[0] == 0
    (tmp_path / "file").touch()
    monkeypatch.setattr(remembered.platformdirs, "user_cache_dir", lambda *a, **k: str(tmp_path / "file"))
    times, found, notes = reads(monkeypatch, manifest)
    assert times == 0 and len(found) == 5 and any("nothing that was read" in note for note in notes)
