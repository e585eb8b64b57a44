"""Shards as img2dataset and others write them, without an index of ours."""

import gzip
import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipmapper.data.records import Record
from clipmapper.data.shards import samples as shard_samples
from clipmapper.data.shards import scan as shard_scan
from clipmapper.data.shards.data import ShardData
from clipmapper.errors import UserError
from clipmapper.host.progress import ProgressLines, span
from clipmapper.training.batches import ReadableItems, left_out_lines


def image(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def a_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tiny(record: Record) -> torch.Tensor:
    record.pil()
    return torch.zeros(3, 1, 1, dtype=torch.uint8)


def img2dataset(folder: Path, shards: int = 3, each: int = 4) -> Path:
    """Files named and filled as img2dataset does."""
    for shard in range(shards):
        files = {}
        for n in range(each):
            key = f"{shard:05d}{n:04d}"
            told = {"url": f"http://x/{key}", "caption": f"picture {key}", "key": key, "status": "success",
                    "error_message": None, "width": 12, "height": 9, "sha256": "00"}  # fmt: skip
            files |= {f"{key}.jpg": image(100 * shard + n), f"{key}.json": json.dumps(told).encode()}
            files[f"{key}.txt"] = told["caption"].encode()
        a_tar(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


def captions(data: ShardData) -> list[str]:
    records = [*data.every_training_record(), *data.validation]
    return sorted(caption for record in records for caption in record.captions)


def test_a_folder_of_img2dataset(tmp_path):
    folder = img2dataset(tmp_path / "laion")
    wanted = sorted(f"picture {s:05d}{n:04d}" for s in range(3) for n in range(4))
    for path in (folder, f"{folder}/{{00000..00002}}.tar"):
        data = ShardData(str(path), buffer=4, validation_share=0.3)
        assert data.kind == "captions" and captions(data) == wanted
        assert data.train_records + len(data.validation) == 12 and len(data.validation) >= 1
        assert {"picture", "000010002"} <= set(data.wordings())
        for record in data.validation:
            shard, number = divmod(int(record.id), 10000)
            assert record.image.read() == image(100 * shard + number)
        assert "validation: images of train, drawn by data.split_seed=0" in data.summary()
        seen = [r.id for r in islice(data.stream(0).records(), 3 * data.train_records)]
        assert len(set(seen)) == data.train_records and not {r.id for r in data.validation} & set(seen)
    one = ShardData(str(folder / "00001.tar"), f"{folder}/{{00000,00002}}.tar", buffer=4)
    assert one.train_records == 4 and len(one.validation) == 8
    with pytest.raises(UserError, match=r"1 of 4 files are not there; the first is .*00003\.tar"):
        ShardData(f"{folder}/{{00000..00003}}.tar", buffer=4)
    with pytest.raises(UserError, match=r"00001\.tar is among the files of data.path too"):
        ShardData(str(folder), str(folder / "00001.tar"), buffer=4)


def test_what_was_found_is_remembered_until_a_shard_changes(tmp_path, monkeypatch):
    folder, read = img2dataset(tmp_path), []
    monkeypatch.setattr(
        shard_scan, "members", lambda file: read.append(file.name) or shard_samples.members(file)
    )
    first = captions(ShardData(str(folder), buffer=4))
    assert len(read) == 3 and captions(ShardData(str(folder), buffer=4)) == first and len(read) == 3
    a_tar(folder / "00001.tar", {"x.JPG": image(5), "x.txt": "neu und schön".encode()})
    assert "neu und schön" in captions(ShardData(str(folder), buffer=4)) and len(read) == 4


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = img2dataset(tmp_path / "data")
    (folder / ".clipmapper").write_text("no folder can be made of this name")
    assert len(captions(ShardData(str(folder), buffer=4))) == 12
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 3


def test_other_ways_to_name_and_tell(tmp_path):
    asked = {"question": "what?", "answers": ["a", "b"], "answer_type": "other", "id": 7}
    several = [{"question": "q0", "answer": "a"}, {"question": "q1", "answers": [{"answer": "b"}] * 10}]
    a_tar(tmp_path / "vqa-train-000.tar", {
        "./d/a.b.PNG": image(0, "PNG"), "./d/a.JSON": json.dumps(asked).encode(), "d/a.cls": b"3",
        "k.webp": image(1, "WEBP"), "k.json": json.dumps(several).encode(),
        "__meta__.json": b"{", "._k.jpg": b"x",
    })  # fmt: skip
    a_tar(tmp_path / "vqa-val-000.tar", {"v.jpeg": image(2), "v.json": json.dumps(asked).encode()})
    a_tar(tmp_path / "vqa-test-000.tar", {"t.jpeg": image(3), "t.json": b'{"question": "what?"}'})
    data = ShardData(str(tmp_path), buffer=4)
    assert data.kind == "questions" and set(data.answers) == {"a", "b"}
    found = {r.question: r for r in data.every_training_record()}
    assert found["what?"].id == 7 and found["what?"].family == "other" and found["q0"].id == "k/0"
    assert found["q1"].answers == ("b",) * 10 and found["q0"].image_id == found["q1"].image_id
    assert [len(data.splits[name]) for name in ("validation", "test")] == [1, 1]
    a_tar(tmp_path / "other.tar", {"v.jpeg": image(2), "v.txt": b"a"})
    with pytest.raises(UserError, match=r"vqa-\w+-000.tar names a split, other.tar does not"):
        ShardData(str(tmp_path), buffer=4)


WRONG = {
    "an image without text": {"a.jpg": image(9)},
    "no image": {"a.txt": b"a"},
    "not UTF-8 text": {"a.jpg": image(9), "a.txt": b"caf\xe9"},
    "not JSON": {"a.jpg": image(9), "a.json": b"{"},
    "several images of one key": {"a.jpg": image(9), "a.seg.png": image(8, "PNG"), "a.txt": b"a"},
    "empty caption": {"a.jpg": image(9), "a.txt": b" "},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_sample_is_named_or_left_out(tmp_path, kind):
    img2dataset(tmp_path, 1)
    a_tar(tmp_path / "00007.tar", WRONG[kind] | {"z.jpg": image(7), "z.txt": b"z"})
    with pytest.raises(UserError, match=rf"00007\.tar: a\.\w+: {kind}"):
        ShardData(str(tmp_path), buffer=4)
    data = ShardData(str(tmp_path), buffer=4, on_bad_image="skip")
    assert len(captions(data)) == 5
    assert any(f"left out of the shards: 1 x {kind}" in line for line in data.summary())


def test_a_key_that_comes_twice(tmp_path):
    both = {"a.jpg": image(1), "a.txt": b"a", "b.jpg": image(2), "b.txt": b"b"}
    a_tar(tmp_path / "0.tar", both)
    a_tar(tmp_path / "1.tar", both)
    data = ShardData(str(tmp_path), buffer=4)
    ids = {r.id for r in [*data.every_training_record(), *data.validation]}
    assert ids == {"0/a", "0/b", "1/a", "1/b"}
    with tarfile.open(tmp_path / "1.tar", "a") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UserError, match=r"1\.tar: a\.txt: the same file twice"):
        ShardData(str(tmp_path), buffer=4)


def test_a_tar_that_is_cut_joined_packed_empty_or_something_else(tmp_path):
    whole = img2dataset(tmp_path, 1)
    content = (whole / "00000.tar").read_bytes()
    with tarfile.open(whole / "00000.tar") as tar:
        last = tar.getmembers()[-3]
    damaged = bytearray(content)
    damaged[last.offset : last.offset + 512] = b"x" * 512
    cases = {
        "cut off": content[: last.offset_data + 50], "cut off: it has no end mark": content[: last.offset],
        "files behind its end mark": content + content, "damaged: no header at byte": bytes(damaged),
        "an empty file": b"", "not a readable tar file": b"<html>not found</html>" * 99,
    }  # fmt: skip
    for number, (says, bytes_) in enumerate(cases.items()):
        (whole / "00001.tar").write_bytes(bytes_)
        os.utime(whole / "00001.tar", (number, number))
        with pytest.raises(UserError, match=rf"00001\.tar: {says}"):
            ShardData(str(whole), buffer=4)
        left = ShardData(str(whole), buffer=4, on_bad_image="skip")
        assert len(captions(left)) >= 4 and f"1 x {says.partition(':')[0]}" in left.summary()[-2]
    (whole / "00001.tar").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=r"00001\.tar: compressed \(gzip\)"):
        ShardData(str(whole), buffer=4)
    for file in whole.glob("*.tar"):
        file.rename(file.with_suffix(".tar.gz"))
    with pytest.raises(UserError, match=r"no tar files in this folder; 00000\.tar\.gz is compressed"):
        ShardData(str(whole), buffer=4)
    with pytest.raises(UserError, match="no image with a text for train"):
        ShardData(str(a_tar(tmp_path / "none" / "0.tar", {})), buffer=4)


def test_a_resumed_stream_reads_nothing_of_what_was_passed(tmp_path, monkeypatch):
    folder = img2dataset(tmp_path, 4, 30)
    data = ShardData(str(folder), buffer=8)
    whole = [r.id for r in islice(data.stream(0).records(1, 2), 40)]
    read, original = [], shard_samples.os.pread

    def pread(fd, size, offset):
        read.append(size)
        return original(fd, size, offset)

    monkeypatch.setattr(shard_samples.os, "pread", pread)
    spent = []
    for start in (0, 30, 35):
        read.clear()
        assert [r.id for r in islice(data.stream(0).records(1, 2, start), 5)] == whole[start : start + 5]
        spent.append((len(read), sum(read)))
    # Five records are read: their JSON and caption, no image, whatever was passed.
    assert {count for count, _ in spent} == {10} and max(b for _, b in spent) < 1.05 * min(
        b for _, b in spent
    )


def test_an_unreadable_image_is_named_or_another_put_in_its_place(tmp_path):
    files = {}
    for n in range(6):
        files |= {f"{n}.jpg": b"no image" if n in (1, 4) else image(n), f"{n}.txt": b"%d" % n}
    folder = a_tar(tmp_path / "data" / "0.tar", files).parent
    a_tar(tmp_path / "val" / "0.tar", {"v.jpg": image(9), "v.txt": b"v"})
    data = ShardData(str(folder), str(tmp_path / "val"), buffer=1)
    records = data.every_training_record()
    with pytest.raises(
        UserError, match=r"0\.tar: 1\.jpg: image of 8 bytes: not a readable .*on_bad_image=skip"
    ):
        ReadableItems(tiny, "error", tmp_path).of(records, lambda: iter(()))
    for _ in range(2):  # a resumed run finds the same again
        skipping = ReadableItems(tiny, "skip", tmp_path)
        found = skipping.of(records, lambda: iter(()))
        assert [record.id for record, _ in found] == [0, 0, 2, 3, 2, 5]
        assert [record.id for record, _ in skipping.of([records[1]], lambda: iter(records[4:]))] == [5]
    (line,) = left_out_lines(tmp_path)
    assert line.startswith("2 unreadable training images were left out, such as ") and "0.tar: 4.jpg" in line
    with pytest.raises(UserError, match="none of 1,000 images in a row"):
        skipping.of([records[1]], lambda: iter([records[4]] * 5000))
    a_tar(tmp_path / "val" / "0.tar", {"v.jpg": image(9), "v.txt": b"v", "w.jpg": b"no", "w.txt": b"w"})
    with pytest.raises(UserError, match=r"0\.tar: w\.jpg: unreadable image"):
        ShardData(str(folder), str(tmp_path / "val"), buffer=1)
    left = ShardData(str(folder), str(tmp_path / "val"), buffer=1, on_bad_image="skip")
    assert len(left.validation) == 1 and "1 unreadable images" in left.summary()[-1]


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = ProgressLines("tokens", 1100)
    lines.advance(100)  # by an earlier run
    for _ in range(60):
        now[0] += 3
        lines.advance(10)
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 3 and printed[0] == "tokens: 300 of 1,100 (27 %), 3.33 a second, about 4.0 min left"
    )
    assert [span(s) for s in (0.1, 30, 3600, 86400 * 3)] == ["1 s", "30 s", "60 min", "3.0 days"]
