"""Large JSON files, entry by entry."""

import gc
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmapper.data.readers import fields
from clipmapper.data.readers.fields import NUMBER, TEXT, Entries, entries_of
from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
SCHEMA = {"id": NUMBER, "text": TEXT}


def read(file: Path, piece: int) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "_PIECE", piece)
        return list(entries_of(file, "wanted"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


@settings(max_examples=200)
@given(
    content=st.dictionaries(st.sampled_from(["a", "wanted", "wante", '"']), st.lists(VALUES, max_size=4)),
    more=VALUES,
    piece=st.integers(1, 12),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    cut=st.integers(0, 40),
)
def test_entries_are_those_of_json(file, content, more, piece, indent, ascii_only, cut):
    text = json.dumps(content | {"more": more}, indent=indent, ensure_ascii=ascii_only)
    file.write_text(text, encoding="utf-8")
    if "wanted" not in content:
        with pytest.raises(ValueError):
            read(file, piece)
        return
    assert repr(read(file, piece)) == repr(json.loads(text)["wanted"])  # NaN is not equal to itself
    if 0 < cut < len(text):  # a file that ends early is never taken for a whole one
        file.write_text(text[:-cut], encoding="utf-8")
        with pytest.raises(ValueError):
            read(file, piece)


@pytest.mark.slow
def test_no_more_than_a_piece_and_an_entry_is_in_memory(file):
    entries = [{"id": n, "text": "x" * 50} for n in range(2000)]
    file.write_text(json.dumps({"other": [0] * 10_000, "wanted": entries}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "_PIECE", 1024)
        tracemalloc.start()
        try:
            assert sum(1 for _ in Entries().of_file(file, "wanted", "it", SCHEMA)) == len(entries)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < file.stat().st_size / 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"wanted": [{"id": 1, "text": "a"}], "wanted": []}', "'wanted' is in it twice"),
        ('{"wanted": [{"id": 1, "text": "a"}]} {}', r"not a readable JSON file \(Extra data"),
        ('{"wanted": [{"id": 1, "text": "a"}', "it ends too early, as of a download cut short"),
        ('{"wanted": {"id": 1}}', "no list 'wanted' in it"),
        ('[{"id": 1}]', "no list 'wanted' in it .it is a list"),
        ('{"wanted": [' + "9" * 5000 + "]}", "a number of too many digits"),
        ('{"wanted": [' + "[" * 100_000 + "]}", "nested too deeply"),
        (b'{"wanted": [{"id": 1, "text": "\xe9"}]}', "not UTF-8 text from line 1 on"),
    ],
)
def test_what_is_wrong_is_said_as_of_a_whole_file(file, text, says):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        list(Entries().of_file(file, "wanted", "it", SCHEMA))


def test_a_mark_of_the_encoding_and_half_of_a_surrogate_pair(file):
    file.write_bytes(b'\xef\xbb\xbf{"wanted": ["\\ud800", "\xc3\xa9"]}')
    assert read(file, 3) == ["\ud800", "é"]


def test_a_key_twice_in_an_entry_is_said_as_of_any_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id": 1}, {"id": 2, "id": 3}]}')
    with pytest.raises(UserError, match="'id' stands twice in one object, with different values"):
        list(Entries().of_file(path, "images", "images", {"id": NUMBER}))


class Left:
    """In a cycle: the collector of cycles finds it, and its finalizer needs some of the stack."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        def deeper(levels: int) -> int:
            return levels and deeper(levels - 1)

        deeper(300)


def test_no_finalizer_runs_where_a_text_has_used_up_the_stack(monkeypatch):
    failed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: failed.append(said.exc_type))
    before = gc.get_threshold()
    try:
        for allocations in range(300, 1000, 50):
            gc.set_threshold(0)
            gc.collect()
            Left()
            gc.set_threshold(allocations)
            with pytest.raises(RecursionError):
                parsed_json("[" * 100_000)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled() and not failed
