"""Cached tokens: keyed by all that they depend on, whole after every accident, shared by processes."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import training_models

from clipmapper.data.content import file_digests
from clipmapper.data.record import Record
from clipmapper.data.tables.base import RecordList
from clipmapper.data.token_cache import TokenStore
from clipmapper.data.token_file import TokenFile
from clipmapper.data.world.data import RenderedImage, RenderedReader
from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.training.encoder_tokens import (
    AskedTexts,
    RecordImages,
    asked_texts,
    image_tokens,
    text_tokens,
)

ROWS, SHAPE, PART = 23, (3, 4), 5


def token_file(folder: Path, key=None, dtype=torch.float16, rows=ROWS) -> TokenFile:
    return TokenFile(folder, "images", key or {"weights": "a"}, rows, SHAPE, dtype, PART)


def values(rows) -> torch.Tensor:
    """Every row its number, and every place of a row another fraction: misplaced rows or places show."""
    places = torch.arange(12).reshape(SHAPE) / 16
    return torch.stack([row + places for row in rows])


def computing(log: list, stop_after: int = 10**6, pause: float = 0.0):
    """A ``compute`` that notes the rows it was asked for, and stops as Ctrl-C would."""

    def compute(parts):
        for part in parts:
            if len(log) == stop_after:
                raise KeyboardInterrupt
            time.sleep(pause)
            log.append(part)
            yield part, values(part)

    return compute


def test_file_is_built_once_and_found_again(tmp_path):
    log, seen = [], []
    tokens = token_file(tmp_path).build(computing(log), seen.append)
    assert torch.equal(tokens, values(range(ROWS)).half())
    assert [p.start for p in log] == [0, 5, 10, 15, 20] and sum(seen) == ROWS
    again = token_file(tmp_path).build(computing(log), seen.append)
    assert torch.equal(again, tokens) and len(log) == 5 and sum(seen) == 2 * ROWS
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {
        "tokens.npy", "key.json", "done", "verified.json", "build.lock"
    }  # fmt: skip
    # It is mapped, not read; what a caller writes does not reach the file.
    again[:] = 0
    assert torch.equal(token_file(tmp_path).open(), tokens)


def test_interrupted_build_goes_on_where_it_stopped(tmp_path):
    first, second, seen = [], [], []
    with pytest.raises(KeyboardInterrupt):
        token_file(tmp_path).build(computing(first, stop_after=2))
    assert token_file(tmp_path).open() is None
    tokens = token_file(tmp_path).build(computing(second), seen.append)
    assert [p.start for p in first + second] == [0, 5, 10, 15, 20] and len(second) == 3
    assert seen[0] == 10 and sum(seen) == ROWS
    assert torch.equal(tokens, values(range(ROWS)).half())


def _build_slowly(folder: Path, log: Path) -> None:
    def compute(parts):
        for part in parts:
            time.sleep(0.1)
            with open(log, "a") as file:
                file.write(f"{part.start}\n")
            yield part, values(part)

    token_file(folder, rows=60).build(compute)


def test_killed_build_goes_on_and_two_processes_share_the_work(tmp_path):
    fork = multiprocessing.get_context("fork")
    folder, log = tmp_path / "cache", tmp_path / "log"
    killed = fork.Process(target=_build_slowly, args=(folder, log))
    killed.start()
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    done_before = log.read_text().count("\n")
    both = [fork.Process(target=_build_slowly, args=(folder, tmp_path / f"log{i}")) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    tokens = token_file(folder, rows=60).open()
    assert torch.equal(tokens, values(range(60)).half())
    shared = [[int(n) for n in (tmp_path / f"log{i}").read_text().split()] for i in range(2)]
    # The part that was being written when the process was killed may be computed again; no other is.
    assert not set(shared[0]) & set(shared[1]) and all(shared)
    assert 12 <= done_before + len(shared[0]) + len(shared[1]) <= 13


@pytest.mark.parametrize(
    "changed",
    [{"key": {"weights": "b"}}, {"key": {"weights": "a", "more": 1}}, {"dtype": torch.float32}, {"rows": 24}],
)
def test_another_key_is_another_file(tmp_path, changed):
    token_file(tmp_path).build(computing([]))
    other = token_file(tmp_path, **changed)
    assert other.open() is None
    log = []
    other.build(computing(log))
    assert log and token_file(tmp_path).open() is not None


def test_damaged_and_misplaced_files_are_refused(tmp_path):
    cache, other = token_file(tmp_path), token_file(tmp_path, key={"weights": "b"})
    cache.build(computing([]))
    cache.folder.rename(other.folder)
    with pytest.raises(UserError, match="holds other tokens than its name says"):
        other.open()
    cache.build(computing([]))
    os.truncate(cache.folder / "tokens.npy", 200)
    with pytest.raises(UserError, match="damaged"):
        cache.build(computing([]))


def test_disk_that_is_too_small_or_full_is_told_before_or_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"needs 0.0 GB, 0.0 GB are free; training.token_cache=false"):
        token_file(tmp_path).build(computing([]))
    monkeypatch.undo()

    def full(parts):
        for number, part in enumerate(parts):
            if number == 2:
                raise OSError(28, "No space left on device")
            yield part, values(part)

    with pytest.raises(UserError, match=r"No space left on device.*goes on from here"):
        token_file(tmp_path).build(full)
    log = []
    token_file(tmp_path).build(computing(log))
    assert len(log) == 3


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    def huge(factor):
        def compute(parts):
            return ((part, values(part) * factor) for part in parts)

        return compute

    with pytest.raises(UserError, match="token_precision=float32"):
        token_file(tmp_path).build(huge(1e5))
    assert token_file(tmp_path, dtype=torch.float32).build(huge(1e5)).max() > 65504
    with pytest.raises(UserError, match="not finite"):
        token_file(tmp_path, key={"weights": "nan"}).build(huge(float("nan")))


class Rows:
    """Stands for what the workers load: the number of each row, as a tensor."""

    def __call__(self, rows):
        return torch.tensor(list(rows))


def test_a_byte_that_was_changed_is_found(tmp_path):
    cache = token_file(tmp_path)
    cache.build(computing([]))
    file, content = cache.folder / "tokens.npy", (cache.folder / "tokens.npy").read_bytes()
    row = 2 * 12
    for place, rows in ((len(content) - 1, "20 to 22"), (len(content) - 18 * row, "5 to 9")):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"rows {rows} are not what was computed"):
            cache.open()
    # What is right again, or a copy, is compared once and then known by its times.
    file.write_bytes(content)
    (cache.folder / "verified.json").write_text("5")
    assert torch.equal(cache.open(), values(range(ROWS)).half())
    known = (cache.folder / "verified.json").read_text()
    assert cache.open() is not None and (cache.folder / "verified.json").read_text() == known != "5"
    (cache.folder / "done").write_bytes(b"")
    assert cache.open() is not None  # needed to compare, which there is no reason for
    file.touch()
    with pytest.raises(UserError, match="done is not whole"):
        cache.open()


def test_marks_of_all_parts_are_read_so_often_as_time_passes_and_not_for_each_part(tmp_path, monkeypatch):
    looks, original = [], TokenFile._done

    def done(self):
        looks.append(1)
        return original(self)

    monkeypatch.setattr(TokenFile, "_done", done)
    monkeypatch.setattr("clipmapper.data.token_file._LOOK", 1000.0)
    TokenFile(tmp_path, "images", {}, 60, SHAPE, torch.float16, 1).build(computing([]))
    assert len(looks) == 2
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("part-*.lock"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_store_gives_the_same_in_memory_and_on_disk_with_and_without_workers(tmp_path, workers, on_disk):
    store = TokenStore(tmp_path if on_disk else None, "float32", workers, batch_size=PART)
    seen = []
    tokens = store.tokens(
        "images", lambda: {"a": 1}, ROWS, SHAPE, Rows(), lambda rows: values(rows.tolist()), seen.append
    )
    assert tokens.dtype == torch.float32 and torch.equal(tokens, values(range(ROWS)))
    assert sum(seen) == ROWS and any(tmp_path.iterdir()) == on_disk


def test_files_are_known_by_their_content(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    index, read = tmp_path / "index", []
    first = file_digests(paths, index)
    assert len(set(first)) == 3
    before = os.stat(paths[1])
    time.sleep(0.02)
    # Other content of the same size, and the time of the change set back.
    paths[1].write_bytes(b"x" * 1000)
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    second = file_digests(paths, index, progress=read.append)
    assert second[1] != first[1] and second[::2] == first[::2] and sum(read) == 3
    # The same content elsewhere is the same data.
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(paths[0].read_bytes())
    assert file_digests([copy], index) == [first[0]]
    (index / "file_digests.json").write_text("{damaged")
    assert file_digests(paths, index) == second


def test_files_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"a")
    digest = file_digests([path], tmp_path / "index")
    monkeypatch.setattr("clipmapper.data.content._read", lambda path: pytest.fail("read again"))
    assert file_digests([path], tmp_path / "index") == digest


# The key: each of its parts changed alone


TEXTS = ("a red ring", "what colour is the ring?", "a red ring")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory) -> str:
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)


def encoder_of(architecture: str) -> ClipEncoder:
    torch.manual_seed(0)
    return ClipEncoder(architecture)


def cached(encoder: ClipEncoder, folder: Path, pixels: np.ndarray, texts=TEXTS) -> tuple[int, int]:
    """How many rows of images and of texts had to be encoded."""
    encoded = []
    image_tower, text_tower = encoder._towers
    encoder._towers = (_counting(image_tower, encoded), _counting(text_tower, encoded))
    try:
        store = TokenStore(folder, batch_size=4)
        records = [Record(n, RenderedImage(image), str(n)) for n, image in enumerate(pixels)]
        source = RecordImages(records, RenderedReader(encoder.clip.visual), folder)
        image_tokens(encoder, store, source, lambda done: None)
        images = sum(encoded)
        text_tokens(encoder, store, _asked(encoder, texts), lambda done: None)
    finally:
        encoder._towers = (image_tower, text_tower)
    return images, sum(encoded) - images


def _asked(encoder: ClipEncoder, texts) -> AskedTexts:
    records = [Record(n, b"", "0", text) for n, text in enumerate(texts)]
    return asked_texts(encoder.tokenizer, RecordList(records), "train")


class _counting:
    def __init__(self, tower, encoded: list) -> None:
        self.tower, self.encoded = tower, encoded

    def __getattr__(self, name):
        return getattr(self.tower, name)

    def __call__(self, batch, **more):
        self.encoded.append(len(batch))
        return self.tower(batch, **more)


def test_stale_tokens_are_never_used(tmp_path, architecture, pixels):
    encoder = encoder_of(architecture)
    assert cached(encoder, tmp_path, pixels) == (6, 2)
    assert cached(encoder_of(architecture), tmp_path, pixels) == (0, 0)  # the same weights, built anew

    other = pixels.copy()
    other[3, 5, 5, 1] ^= 1
    assert cached(encoder, tmp_path, other) == (6, 0)
    assert cached(encoder, tmp_path, pixels[::-1].copy()) == (6, 0)
    assert cached(encoder, tmp_path, pixels, (*TEXTS, "a cross")) == (0, 3)

    for name, expected in (("visual.conv1.weight", (6, 0)), ("token_embedding.weight", (0, 2))):
        changed = encoder_of(architecture)
        weight = changed.clip.get_parameter(name)
        weight.data.view(-1)[7] += 1e-3
        assert cached(changed, tmp_path, pixels) == expected, name

    for setting, value in (("mean", (0.5, 0.5, 0.5)), ("interpolation", "bilinear")):
        changed = encoder_of(architecture)
        changed.clip.visual.preprocess_cfg[setting] = value
        assert cached(changed, tmp_path, pixels) == (6, 0), setting

    # Other ids for the same texts: another tokenizer. Images have nothing to do with it.
    changed = encoder_of(architecture)
    changed.tokenizer.encoder = {k: v if v < 1000 else v - 1 for k, v in changed.tokenizer.encoder.items()}
    assert cached(changed, tmp_path, pixels) == (0, 2)


def test_another_architecture_with_the_same_weights_is_another_key(tmp_path, architecture, pixels):
    """QuickGELU has no weights: OpenAI's checkpoints load into both."""
    encoder = encoder_of(architecture)
    assert cached(encoder, tmp_path, pixels) == (6, 2)
    config = json.loads(Path(architecture).read_text()) | {"quick_gelu": True}
    quick = tmp_path / "tiny-quick-clip-for-tests.json"
    quick.write_text(json.dumps(config))
    changed = encoder_of(str(quick))
    changed.clip.load_state_dict(encoder.clip.state_dict())
    assert cached(changed, tmp_path, pixels) == (6, 2)
