"""WebDataset shards: nothing lost, nothing twice, the same after a resumption."""

import io
import json
import os
import tarfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.slow import mostly_slow
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import Record, RecordData
from clipmapper.data.shards.data import ShardData, ShardStream, in_order
from clipmapper.data.shards.files import write_shards
from clipmapper.data.shards.index import read_index
from clipmapper.data.shards.scan import ScannedShard, scanned
from clipmapper.errors import UserError
from clipmapper.training.batches import ReadableItems, shard_batches
from clipmapper.training.processes import Share

IMAGES, SHARD = 22, 3


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def questions(images: range) -> list[Record]:
    """One to three questions about an image."""
    return [
        Record(100 * i + q, jpeg(i), f"image {i}", f"what is {q}?", ("one", "Two"), "what")
        for i in images
        for q in range(1 + i % 3)
    ]


def data_of(train: range = range(IMAGES)) -> RecordData:
    splits = {"train": questions(train), "validation": questions(range(50, 54))}
    return RecordData(splits, AnswerVocabulary(["one", "two"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(data_of(), folder, images_per_shard=SHARD, seed=0)
    return folder


def shards_of(folder: Path, split: str = "train") -> list[ScannedShard]:
    return scanned([folder / shard.name for shard in read_index(folder).splits[split]])


def stream(folder: Path, buffer: int = 8, seed: int = 0) -> ShardStream:
    return ShardStream(str(folder), shards_of(folder), buffer=buffer, seed=seed)


def tiny(record: Record) -> torch.Tensor:
    record.pil()
    return torch.zeros(3, 1, 1, dtype=torch.uint8)


def test_records_come_back_as_they_were(folder):
    index = read_index(folder)
    assert index.answers == ["one", "two"] and index.families == ["what"]
    for split, wanted in data_of().splits.items():
        shards = shards_of(folder, split)
        found = {r.id: r for r in in_order(shards)}
        assert len(found) == len(wanted) == sum(s.records for s in index.splits[split])
        for record in wanted:
            again = found[record.id]
            assert (again.image.read(), again.image_id, again.question) == (
                record.image,
                record.image_id,
                record.question,
            )
            assert (again.answers, again.family) == (record.answers, record.family)
    # The questions of an image are together, the images not in their old order.
    order = [r.image_id for r in in_order(shards_of(folder))]
    assert order != sorted(order) and len({*order}) == sum(a != b for a, b in pairwise(order)) + 1


def test_an_image_is_stored_once(folder):
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = [member.name for member in tar]
    assert len(names) == 2 * SHARD and {n.split(".")[1] for n in names} == {"jpg", "json"}


class Readers(IterableDataset):
    """One node: its workers' (node, worker, id)."""

    def __init__(self, stream: ShardStream, node: int, nodes: int, records: int) -> None:
        self.stream, self.node, self.nodes, self.records = stream, node, nodes, records

    def __iter__(self):
        worker = get_worker_info()
        index, of = self.node * worker.num_workers + worker.id, self.nodes * worker.num_workers
        mine = sum(s.records for e in range(self.records) for s in self.stream.epoch_shards(e, index, of))
        yield from ((index, record.id) for record in islice(self.stream.records(index, of), mine))


def test_an_epoch_over_two_nodes_of_two_workers_has_every_sample_once(folder):
    epochs = 3
    found = []
    for node in range(2):
        loader = DataLoader(Readers(stream(folder), node, 2, epochs), batch_size=None, num_workers=2)
        found += [(int(index), int(id_)) for index, id_ in loader]
    wanted = [r.id for r in questions(range(IMAGES))]
    counted = Counter(id_ for _, id_ in found)
    assert counted == dict.fromkeys(wanted, epochs)
    assert {index for index, _ in found} == {0, 1, 2, 3}
    # Epoch by epoch as well, not only in the sum; and the shards are dealt anew.
    dealt = set()
    for epoch in range(epochs):
        of_epoch = []
        for index in range(4):
            before = sum(s.records for e in range(epoch) for s in stream(folder).epoch_shards(e, index, 4))
            shards = stream(folder).epoch_shards(epoch, index, 4)
            dealt.add((index, *(s.path.name for s in shards)))
            size = sum(s.records for s in shards)
            of_epoch += [r.id for r in islice(stream(folder).records(index, 4, before), size)]
        assert sorted(of_epoch) == sorted(wanted), epoch
    assert len(dealt) > 4


@pytest.mark.parametrize("of", [1, 2])
def test_a_stream_goes_on_from_any_position(folder, of):
    records = sum(s.records for s in stream(folder).shards)
    whole = [r.id for r in islice(stream(folder).records(of - 1, of), 3 * records)]
    for start in (0, 1, 7, records // of - 1, records, 2 * records + 5):
        later = [r.id for r in islice(stream(folder).records(of - 1, of, start), 20)]
        assert later == whole[start : start + 20], start


def test_batches_are_those_of_the_stream_in_whatever_order_they_are_asked_for(folder):
    whole = [r.id for r in islice(stream(folder).records(1, 2), 40)]
    one = stream(folder)
    for number in (0, 1, 2, 1, 7, 3, 4):
        assert [r.id for r in one.batch(number, 4, 1, 2)] == whole[4 * number : 4 * number + 4]
    # Streams do not disturb each other.
    assert [r.id for r in one.batch(0, 4, 0, 2)] == [r.id for r in islice(stream(folder).records(0, 2), 4)]
    assert [r.id for r in one.batch(5, 4, 1, 2)] == whole[20:24]


def test_the_order_is_the_seeds(folder):
    def ids(**how):
        return [r.id for r in islice(stream(folder, **how).records(), 44)]

    assert ids() == ids() != ids(seed=1)
    mixed, unmixed = ids(buffer=16), ids(buffer=1)
    neighbours = [sum(a // 100 == b // 100 for a, b in pairwise(o)) for o in (mixed, unmixed)]
    assert neighbours[0] < neighbours[1] / 2  # questions of an image no longer stand together


def test_fewer_shards_than_readers_is_one_clear_line(folder):
    with pytest.raises(UserError, match=r"8 shards cannot be shared among 9 readers"):
        next(stream(folder).records(0, 9))


def test_writing_goes_on_where_it_was_interrupted(tmp_path):
    def stop(images):
        stop.seen = getattr(stop, "seen", 0) + images
        if stop.seen > 2 * SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(data_of(), tmp_path, images_per_shard=SHARD, seed=0, progress=stop)
    with pytest.raises(UserError, match=r"no shards\.json: .* was interrupted; the same command goes on"):
        read_index(tmp_path)
    written = {p: os.stat(p).st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert len(written) == 3
    write_shards(data_of(), tmp_path, images_per_shard=SHARD, seed=0)
    assert all(os.stat(p).st_mtime_ns == when for p, when in written.items())
    ids = [r.id for r in in_order(shards_of(tmp_path))]
    assert sorted(ids) == [r.id for r in questions(range(IMAGES))]
    assert not list(tmp_path.glob("*.tmp"))


def test_shards_of_other_data_are_not_mixed(folder, tmp_path):
    with pytest.raises(UserError, match="other data, or made with other settings"):
        write_shards(data_of(), folder, images_per_shard=SHARD + 1, seed=0)
    with pytest.raises(UserError, match="other data"):
        write_shards(data_of(range(21)), folder, images_per_shard=SHARD, seed=0)
    (tmp_path / "train-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds tar files already"):
        write_shards(data_of(), tmp_path, images_per_shard=SHARD, seed=0)


def test_damaged_shards_are_told(folder, tmp_path):
    for shard in folder.iterdir():
        if shard.is_file():
            (tmp_path / shard.name).write_bytes(shard.read_bytes())
    first = stream(tmp_path).epoch_shards(0, 0, 1)[0].path.name
    content = (tmp_path / first).read_bytes()
    with tarfile.open(tmp_path / first) as tar:
        end = tar.getmembers()[-2].offset
    for cut in (end, end + 600):  # between two images, and in the middle of one
        (tmp_path / first).write_bytes(content[:cut])
        with pytest.raises(UserError, match=rf"{first}.*cut off"):
            ShardData(str(tmp_path), buffer=4)
    (tmp_path / first).write_bytes(content)
    reading = stream(tmp_path).records()
    next(reading)
    (tmp_path / first).unlink()
    with pytest.raises(UserError, match=f"{first}.*No such file"):
        list(islice(reading, 60))


def test_an_image_of_an_unknown_format_becomes_a_png(tmp_path):
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(1))).save(file, "BMP")
    data = RecordData({"train": [Record(1, file.getvalue(), "a", captions=("a b", "b c"))]}, None)
    data.splits["validation"] = data.splits["train"]
    write_shards(data, tmp_path, images_per_shard=5, seed=0)
    (record,) = in_order(shards_of(tmp_path))
    assert record.image.read()[1:4] == b"PNG" and record.captions == ("a b", "b c")
    assert np.array_equal(np.asarray(record.pil()), np.asarray(data.train[0].pil()))
    assert json.loads((tmp_path / "shards.json").read_text())["words"] == ["a", "b", "c"]
    (broken,) = [Record(1, b"no image", "a", captions=("a",), source="my.jsonl:3")]
    with pytest.raises(UserError, match=r"my\.jsonl:3"):
        write_shards(
            RecordData({"train": [broken], "validation": [broken]}, None),
            tmp_path / "b", images_per_shard=5, seed=0,
        )  # fmt: skip


class Steps(IterableDataset):
    """The steps of a share's workers, dealt as training deals them."""

    def __init__(self, batch_at, first: int, last: int, share: Share) -> None:
        self.batch_at, self.first, self.last, self.share = batch_at, first, last, share

    def __iter__(self):
        worker = get_worker_info()
        for step in range(self.first + worker.id, self.last, worker.num_workers):
            yield step, self.batch_at(step, self.share)


@pytest.mark.parametrize("first", mostly_slow([1, 4], [4]))
def test_training_resumed_at_a_step_sees_the_samples_that_it_would_have_seen(folder, first):
    def batches(first: int, share: Share) -> dict[int, list[int]]:
        items = ReadableItems(tiny, "error", folder)
        batch_at = shard_batches(
            stream(folder), items, lambda made, step: {"ids": [r.id for r, _ in made]}, 7
        )
        loader = DataLoader(Steps(batch_at, first, 9, share), batch_size=None, num_workers=2)
        return {int(step): batch["ids"] for step, batch in loader}

    for share, size in ((Share(0, 2), 4), (Share(1, 2), 3)):
        whole, resumed = batches(0, share), batches(first, share)
        assert list(whole) == list(range(9)) and all(len(ids) == size for ids in whole.values())
        assert list(resumed) == list(range(first, 9))
        assert all(resumed[step] == whole[step] for step in resumed)
