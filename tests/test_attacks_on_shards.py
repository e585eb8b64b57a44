"""Shards that somebody sends: nothing outside of them is opened, whatever they say, and one line tells."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import Record, RecordData
from clipmapper.data.shards.data import ShardData
from clipmapper.data.shards.files import write_shards
from clipmapper.errors import UserError

SENT = "sent"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def place(tmp_path) -> Path:
    records = [Record(n, png(), f"i{n}", "what?", (f"a{n % 2}",)) for n in range(4)]
    data = RecordData({"train": records, "validation": records}, AnswerVocabulary(["a0", "a1"]))
    write_shards(data, tmp_path / SENT, images_per_shard=2, seed=0)
    return tmp_path


@pytest.fixture
def sent(tmp_path) -> Path:
    """The folder that somebody sent."""
    return tmp_path / SENT


_watched: list | None = None


def _watch(event: str, details: tuple) -> None:
    if _watched is not None and event in ("open", "os.system", "subprocess.Popen", "socket.connect", "exec"):
        _watched.append((event, str(details[0])))


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A file beside the shards that nothing may open, and one that the commands in them would make."""
    global _watched
    (tmp_path / "secret.tar").write_bytes(b"secret")
    (tmp_path / SENT).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _watched = []
    try:
        yield
        seen = [s for s in _watched if s[0] not in ("open", "exec") or "secret" in s[1] or "passwd" in s[1]]
    finally:
        _watched = None
    assert not seen and not list(tmp_path.rglob("touched"))


def one_line(path: Path | str, **more) -> str:
    with pytest.raises(UserError) as told:
        ShardData(str(path), buffer=4, **more)
    line = str(told.value)
    assert "\n" not in line and all(c.isprintable() for c in line)
    return line


def changed(place: Path, change) -> Path:
    index = json.loads((place / SENT / "shards.json").read_text())
    change(index)
    (place / SENT / "shards.json").write_text(json.dumps(index))
    return place / SENT


NAMES = [
    "pipe:touch touched", "pipe:touch touched #.tar", "http://localhost:1/a.tar", "file:secret.tar",
    "/etc/passwd", "../secret.tar", "sub/../../secret.tar", "a\0b.tar", "\x1b[31m.tar", "x" * 5000 + ".tar",
    "..", "", ".tar", "C:\\a.tar", "a b.tar", 5, None, ["a.tar"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_index_are_names_of_files_in_its_folder(place, name):
    def change(index):
        index["splits"]["train"][0]["name"] = name

    assert "shards.json" in one_line(changed(place, change)) and not (place / "touched").exists()


COUNTS = [0, -1, True, "5", 1e30, 2.0, None, [], {}, 10**40, float("nan")]


@pytest.mark.parametrize("what", ["records", "images"])
@pytest.mark.parametrize("count", COUNTS)
def test_counts_in_the_index_are_numbers(place, what, count):
    def change(index):
        index["splits"]["train"][0][what] = count

    assert f"{what} is" in one_line(changed(place, change))


@pytest.mark.parametrize(
    ("records", "says"), [(1, "images, but 1 records"), (3, "2 records"), (2**39, "cut off")]
)
def test_counts_in_the_index_are_those_of_the_shards(place, records, says):
    def change(index):
        index["splits"]["train"][1]["records"] = records

    assert says in one_line(changed(place, change))


WRONG = {
    "no list": lambda i: i["splits"].update(train={"a": 1}),
    "no shards": lambda i: i["splits"].update(train=[]),
    "no train": lambda i: i["splits"].pop("train"),
    "another split": lambda i: i["splits"].update({"../x": []}),
    "splits are a list": lambda i: i.update(splits=[]),
    "a shard twice": lambda i: i["splits"]["train"].append(i["splits"]["train"][0]),
    "a shard in two splits": lambda i: i["splits"]["validation"].append(i["splits"]["train"][0]),
    "more keys": lambda i: i["splits"]["train"][0].update(_target_="os.system"),
    "not there": lambda i: i["splits"]["train"][0].update(name="other.tar"),
    "answers a text": lambda i: i.update(answers="pipe:touch touched"),
    "answers twice": lambda i: i.update(answers=["a0", "a0"]),
    "answers numbers": lambda i: i.update(answers=[1, 2]),
    "one answer": lambda i: i.update(answers=["a0"]),
    "captions": lambda i: i.update(answers=None),
    "rule": lambda i: i.update(rule="os.system"),
    "rule a list": lambda i: i.update(rule=["soft"]),
    "accuracy": lambda i: i.update(accuracy="__class__"),
    "families": lambda i: i.update(families=[["a"]]),
    "words": lambda i: i.update(words={}),
    "no words": lambda i: i.pop("words"),
    "version true": lambda i: i.update(version=True),
    "version 3": lambda i: i.update(version=3),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_index_is_checked_whole(place, name):
    one_line(changed(place, WRONG[name]))


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\xff\xfe{}", b"{", b"[" * 100_000, b'"a"', b"null"])
def test_an_index_that_is_none(place, content):
    (place / SENT / "shards.json").write_bytes(content)
    assert "shards.json" in one_line(place / SENT)


def member(name: str, content: bytes = b"", **how) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in how.items():
        setattr(info, key, value)
    return info, content


def a_tar(path: Path, *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, content in (
            member("a.png", png()), member("a.txt", b"a red square"), *more,
            member("b.png", png()), member("b.txt", b"a square"),
        ):  # fmt: skip
            tar.addfile(info, io.BytesIO(content))
    return path


MEMBERS = {
    "symbolic link": member("c.png", type=tarfile.SYMTYPE, linkname="secret.tar"),
    "absolute link": member("c.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("c.png", type=tarfile.LNKTYPE, linkname="a.png"),
    "character device": member("c.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": member("c.png", type=tarfile.BLKTYPE),
    "pipe": member("c.png", type=tarfile.FIFOTYPE),
    "absolute": member("/etc/passwd.png", png()),
    "upwards": member("../secret.png", png()),
    "upwards inside": member("x/../../secret.png", png()),
    "backslash": member("..\\secret.png", png()),
    "escape": member("\x1b[2Jc.png", png()),
    "newline": member("c\nerror: all is well.png", png()),
    "long": member("c" * 4000 + ".png", png()),
}


@pytest.mark.parametrize("skip", ["error", "skip"])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_that_are_in_no_honest_shard(sent, name, skip):
    a_tar(sent / "00000.tar", MEMBERS[name])
    assert "00000.tar" in one_line(sent, on_bad_image=skip)


def test_headers_that_lie(sent):
    """Sizes that lead backwards, chains of long names, a link of names in pax headers."""
    content = a_tar(sent / "0.tar").read_bytes()
    for number, size in enumerate((b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000100\0")):
        block = bytearray(content)
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        (sent / "0.tar").write_bytes(block)
        os.utime(sent / "0.tar", (number, number))
        assert "0.tar" in one_line(sent)
    chain = b""
    for _ in range(3000):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
        chain += info.tobuf(tarfile.USTAR_FORMAT) + b"abcd".ljust(512, b"\0")
    (sent / "0.tar").write_bytes(chain + content)
    assert "0.tar" in one_line(sent)


KEPT = {"id": 1, "image_id": "a", "question": None, "answers": [], "family": "f", "captions": ["a"]}
NOT_KEPT = ({"id": True}, {"image_id": 5}, {"captions": "abc"}, {"question": "a"}, {"answers": [1]})
TOLD = [
    b'{"image": "/etc/passwd", "_target_": "os.system"}', b'[{"id": 1}]', b"[]", b"null", b"5",
    b"[" * 100_000, b"{", b"\xff\xfe", b'{"caption": true, "question": null}', b'{"question": "what?"}',
    b'{"caption": ["a", {"b": 1}]}', b'{"question": ["what?"], "answer": "a"}',
    *(json.dumps([KEPT | wrong]).encode() for wrong in NOT_KEPT),
]  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_json_that_is_no_record(sent, told):
    a_tar(sent / "0.tar", member("c.png", png()), member("c.json", told))
    assert f"{sent}/0.tar: c.png: " in one_line(sent)
    data = ShardData(str(sent), buffer=4, on_bad_image="skip", validation_share=0.5, split_seed=1)
    assert (
        data.train_records + len(data.validation) == 2 and "left out of the shards: 1 x" in data.summary()[-2]
    )


ADDRESSES = [
    "pipe:touch touched", "pipe:cat {0..3}.tar", "https://localhost:1/{0..3}.tar", "file:///etc", "hf://a",
    "s3://bucket/a", "gs://a", "PIPE:touch touched", "ais://a", "pipe:touch${IFS}touched",
]  # fmt: skip


def test_addresses_are_no_folders(sent):
    for path in ADDRESSES:
        for more in ({}, {"validation_path": path}):
            if more:
                a_tar(sent / "0.tar")
            assert "files of this machine" in one_line(sent if more else path, **more)


def test_files_that_are_not_files(sent):
    os.mkfifo(sent / "0.tar")
    assert "not a file" in one_line(sent)
    (sent / "0.tar").unlink()
    (sent / "0.tar").symlink_to("/dev/zero")
    assert "not a file" in one_line(sent)
    (sent / "0.tar").unlink()
    (sent / "0.tar").mkdir()
    assert "not a file" in one_line(sent)


def test_a_remembered_scan_that_was_tampered_with_is_made_anew(sent):
    a_tar(sent / "0.tar")
    how = {"validation_share": 0.5, "split_seed": 1}
    wanted = [r.image.read() for r in ShardData(str(sent), buffer=4, **how).validation]
    file = sent / ".clipmapper" / "0.tar.npz"
    content = dict(np.load(file))
    for name, value in {
        "places": content["places"] + 10**9,
        "name": np.array([b"\x1b[2Ja.png", b"b.png"]),
        "told": np.frombuffer(b"[]", np.uint8),
        "stamp": np.array([1, 2]),
    }.items():
        np.savez(file, **{**content, name: value})
        found = ShardData(str(sent), buffer=4, **how)
        assert [r.image.read() for r in found.validation] == wanted, name
    file.write_bytes(b"not a file of numpy")
    assert [r.image.read() for r in ShardData(str(sent), buffer=4, **how).validation] == wanted
