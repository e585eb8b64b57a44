"""The token cache under data sets of records."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import caption_models, training_models
from support.slow import mostly_slow
from support.small_records import VOCABULARY, Stored, records_in

from clipmapper.data import token_cache
from clipmapper.data.pixels import PixelReader
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.data.records import Record, RecordData
from clipmapper.data.token_cache import TokenStore
from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.captioning.batches import CaptionBatches
from clipmapper.tasks.captioning.task import CaptionRun
from clipmapper.tasks.vqa.batches import QuestionBatches
from clipmapper.tasks.vqa.task import VQARun
from clipmapper.training.encoder_tokens import token_store
from clipmapper.training.processes import WHOLE
from clipmapper.training.record_tokens import different_images


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training_models.tiny_model(training_models.tiny_clip(tmp_path_factory.mktemp("clip"))).eval()


def asked_in(folder: Path) -> RecordData:
    records = records_in(folder)
    return RecordData({"train": records, "validation": records}, VOCABULARY)


@pytest.mark.parametrize("stored", [False, True])
def test_questions_have_the_tokens_of_their_own_image_and_text(model, tmp_path, stored):
    data = asked_in(tmp_path)
    store = TokenStore(tmp_path / "cache" if stored else None, "float32", batch_size=2)
    cached = QuestionBatches(model, data, "train", data.train, store)
    plain = QuestionBatches(model, data, "train", data.train, None)
    assert len(cached.cache.image_tokens) == 3  # each image once
    chosen = torch.tensor([4, 0, 5, 3])
    found, wanted = cached.batch(chosen), plain.batch(chosen)
    assert "images" not in found and "text" not in found
    assert found["ids"] == wanted["ids"] == [4, 0, 5, 3] and found["targets"].equal(wanted["targets"])
    with torch.no_grad():
        tokens = model.encoder.image_tokens(wanted["images"])
        torch.testing.assert_close(found["image_tokens"], tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.answer_logits(found["image_tokens"], found["text_tokens"], found["text_valid"]),
            model(wanted["images"], wanted["text"]),
            atol=1e-4,
            rtol=1e-4,
        )
    assert found["text_valid"].sum(dim=1).tolist() == wanted["text"].valid.sum(dim=1).tolist()
    assert "image_tokens" not in cached.questions_only(chosen)


def test_images_of_captions_have_their_own_tokens(tmp_path):
    model = caption_models.captioner(training_models.tiny_clip(tmp_path)).float()
    records = records_in(tmp_path)
    data = RecordData({"train": records, "validation": records}, None)
    found, wanted = (
        CaptionBatches(model, data, "train", data.train, store).batch([4, 0], ["a b", "c d e"])
        for store in (TokenStore(None, "float32"), None)
    )
    assert "images" not in found and found["references"] == wanted["references"]
    with torch.no_grad():
        tokens = model.encoder.image_tokens(wanted["images"])
    torch.testing.assert_close(found["image_tokens"], tokens, atol=1e-5, rtol=1e-5)


def test_files_are_known_by_their_content(model, tmp_path):
    reader = PixelReader(model.encoder.clip.visual.preprocess_cfg)

    def digest(folder: Path) -> str:
        return different_images(records_in_place(folder), reader, tmp_path)[0].digest()

    def records_in_place(folder: Path) -> list[Record]:
        return [Record(n, folder / f"{n}.png", str(folder / f"{n}.png")) for n in range(2)]

    records_in(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    first = digest(tmp_path / "here")
    assert first == digest(tmp_path / "here") == digest(tmp_path / "there")
    shutil.copy(tmp_path / "there" / "1.png", tmp_path / "there" / "0.png")
    assert digest(tmp_path / "there") != first
    (tmp_path / "there" / "0.png").unlink()
    with pytest.raises(UserError, match=r"image=.*0\.png: No such file"):
        digest(tmp_path / "there")
    # And what is not a file.
    records = records_in(tmp_path / "here")
    images, _ = different_images(records, reader, tmp_path)
    assert images.digest() == different_images(records[:3], images.reader, tmp_path)[0].digest()
    others = [records[0], records[1], Record(2, Stored(Image.new("RGB", (80, 52))), "2")]
    assert images.digest() != different_images(others, images.reader, tmp_path)[0].digest()


def test_a_later_run_finds_the_tokens_and_other_images_do_not(model, tmp_path):
    data, store = asked_in(tmp_path / "images"), TokenStore(tmp_path / "cache")
    QuestionBatches(model, data, "train", data.train, store)
    kept = sorted(path.name for path in (tmp_path / "cache").glob("*-*"))
    assert len(kept) == 2
    QuestionBatches(model, data, "train", data.train, store)
    assert sorted(path.name for path in (tmp_path / "cache").glob("*-*")) == kept
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "0.png")
    changed = QuestionBatches(model, data, "train", data.train, store)
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2
    with torch.no_grad():
        wanted = model.encoder.image_tokens(changed.dataset[0][1][None])
    torch.testing.assert_close(changed.cache.images(torch.tensor([0])), wanted, atol=2e-2, rtol=2e-3)


# In training


def settings_of(folder: Path, captions: bool, *more: str):
    small = ("model.width=32", "model.depth=1", "training.batch_size=4")
    small += ("training.max_steps=9", "training.warmup_steps=1")
    chosen = ("experiment=caption_manifest",) if captions else ("data=manifest", "model.head_width=16")
    return training_models.train_settings(
        *chosen, f"data.path={folder / 'mine.jsonl'}", *small, "encoder.pretrained=null", "callbacks=none",
        f"encoder.architecture={folder / 'clip.json'}", "logger=csv", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Folders with ten images about each of which there are two lines: questions, and captions."""
    folders = []
    for captions in (False, True):
        folder = tmp_path_factory.mktemp("captions" if captions else "questions")
        architecture = Path(training_models.tiny_clip(folder))
        if architecture != folder / "clip.json":
            architecture.rename(folder / "clip.json")
        lines = []
        for n in range(10):
            pixels = np.random.default_rng(n).integers(0, 256, (30 + 4 * n, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{n}.png")
            for text in ("what is it?", f"what colour is number {n}?"):
                told = {"captions": [text]} if captions else {"question": text, "answers": ["ab"[n % 2]]}
                split = "train" if n < 7 else "validation"
                lines.append(json.dumps({"image": f"{n}.png", "split": split} | told))
        (folder / "mine.jsonl").write_text("\n".join(lines))
        folders.append(folder)
    return folders


def prepared(settings, folder: Path):
    data = manifest_data(str(settings.data.path))
    torch.manual_seed(0)
    task = TASKS[data.kind](settings, data)
    task.prepare(folder)
    return task


TASKS = {"questions": VQARun, "captions": CaptionRun}


@pytest.mark.parametrize("captions", mostly_slow([False, True], 2))
def test_a_run_with_a_cache_has_the_losses_of_one_without(manifests, captions, tmp_path):
    folder, losses = manifests[captions], []
    exact = "training.token_precision=float32"
    for more in (
        ("training.token_cache=false",),
        (exact,),
        (exact, f"training.token_cache_folder={tmp_path}", "training.token_workers=1"),
    ):
        task = prepared(settings_of(folder, captions, *more), tmp_path)
        module = task.module()
        module.log = lambda *_, **__: None
        batches = [task.batch_at(step, WHOLE) for step in range(4)]  # more than an epoch
        assert all(("image_tokens" in batch) == (exact in more) for batch in batches)
        losses.append([module.training_step(b | {"parts": 1}, 0).item() for b in batches])
    assert len({round(loss, 4) for loss in losses[0]}) > 1
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


@pytest.mark.parametrize("captions", [False, True])
def test_tokens_that_no_memory_holds_are_refused_before_any_is_made(
    manifests, captions, tmp_path, monkeypatch
):
    folder = manifests[captions]
    monkeypatch.setattr(ClipEncoder, "image_tokens", lambda *_: pytest.fail("it was encoded"))
    encoder = prepared(settings_of(folder, captions, "training.token_cache=false"), tmp_path).model.encoder
    rows, columns = encoder.grid
    needed = 2 * 10 * (encoder.prefix_tokens + rows * columns) * encoder.image_width
    what = "10 images"
    if not captions:
        questions = ["what is it?", *(f"what colour is number {n}?" for n in range(10))]
        # "what is it?" is in both splits.
        needed += 2 * 12 * tokenize(encoder.tokenizer, questions).ids.shape[1] * encoder.text_width
        what += " and 12 texts"
    monkeypatch.setattr(token_cache, "available_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=rf"tokens of {what} take .* of memory.*training\.token_cache_folder"):
        prepared(settings_of(folder, captions), tmp_path)
    monkeypatch.setattr(token_cache, "available_memory", lambda: needed)
    with pytest.raises(pytest.fail.Exception, match="it was encoded"):
        prepared(settings_of(folder, captions), tmp_path)
    # Two processes keep them twice; files take no memory.
    store = TokenStore(processes=2)
    with pytest.raises(UserError, match="in each of 2 processes take"):
        store.check_room({"images": (1, 1, needed // 2)})
    TokenStore(tmp_path, processes=2).check_room({"images": (1, 1, needed)})


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("encoder.frozen=false",), "no token cache, for the encoder is trained (encoder.frozen=false)"),
        (("training.token_cache=false", "training.token_cache_folder=x"),
         "training.token_cache_folder is not used, for training.token_cache=false"),
        (("training.token_cache=false", "encoder.frozen=false"), None),
        ((), None),
    ],
)  # fmt: skip
def test_settings_that_nothing_can_be_done_with_are_named(manifests, tmp_path, capsys, more, line):
    capsys.readouterr()
    task = prepared(settings_of(manifests[0], False, *more), tmp_path)
    printed = capsys.readouterr().out
    assert (line in printed and printed.count("\n") == 1) if line else True
    # Size and time are said whenever something is computed, and only then.
    assert ("token cache: 10 images and 12 texts, " in printed and "takes about" in printed) == (more == ())
    assert ("image_tokens" in task.batch_at(0, WHOLE)) == (more == ())


@pytest.mark.parametrize("captions", mostly_slow([False, True], [True]))
def test_a_disk_that_is_too_small_for_all_splits_together_is_told_before_any_is_computed(
    manifests, captions, tmp_path, monkeypatch, capsys
):
    folder, cache = manifests[captions], f"training.token_cache_folder={tmp_path / 'cache'}"
    monkeypatch.setattr(token_cache, "free_bytes", lambda folder: 2**30)
    prepared(settings_of(folder, captions, cache), tmp_path)
    needed = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("tokens.npy"))
    assert "takes about" in capsys.readouterr().out
    monkeypatch.setattr(token_cache, "free_bytes", lambda folder: 0)  # nothing more is needed
    prepared(settings_of(folder, captions, cache), tmp_path)
    assert "all there" in capsys.readouterr().out
    # Headers of the four (two) files are no tokens.
    needed -= 128 * len(list((tmp_path / "cache").rglob("tokens.npy")))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(ClipEncoder, "image_tokens", lambda *_: pytest.fail("it was encoded"))
    monkeypatch.setattr(token_cache, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(UserError, match=r"token_cache_folder=.* 10 images.* more, .* are free"):
        prepared(settings_of(folder, captions, cache), tmp_path)
    assert not list((tmp_path / "cache").rglob("tokens*"))
    monkeypatch.setattr(token_cache, "free_bytes", lambda folder: needed)
    with pytest.raises(pytest.fail.Exception, match="it was encoded"):
        prepared(settings_of(folder, captions, cache), tmp_path)


def test_texts_with_a_token_behind_them_are_not_kept(manifests, tmp_path, capsys, model, monkeypatch):
    monkeypatch.setattr(model.encoder.text_tower, "appended_class_token", True)
    settings = settings_of(manifests[0], False)
    assert token_store(settings, model.encoder, texts=True) is None
    assert "puts a token behind each text" in capsys.readouterr().out
    assert token_store(settings, model.encoder, texts=False) is not None


def test_memory_that_is_left(tmp_path, monkeypatch):
    machine, container = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(token_cache, "_MACHINE", machine)
    monkeypatch.setattr(token_cache, "_CONTAINER", container)
    everything = token_cache.available_memory()
    assert everything > 2**28
    machine.write_text("MemTotal: 99 kB\nMemAvailable:    2048 kB\n")
    assert token_cache.available_memory() == 2**21
    container.write_text("max\n")
    assert token_cache.available_memory() == 2**21
    container.write_text("4096\n")
    assert token_cache.available_memory() == 4096


def test_the_experiments_on_real_data_keep_tokens_in_files_or_not_at_all():
    found = {}
    for name in ("vqa_v2_b32", "caption_coco_b32", "vqa_v2_l14_336"):
        settings = training_models.train_settings(f"experiment={name}")
        assert settings.encoder.frozen == settings.training.token_cache
        found[name] = settings.training.token_cache_folder
    assert found["vqa_v2_l14_336"] is None and None not in list(found.values())[:2]
