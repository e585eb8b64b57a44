"""The token cache under data sets of records."""

import shutil
from pathlib import Path

import caption_models
import numpy as np
import pytest
import torch
import training_models
from PIL import Image

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import Record
from clipmapper.data.token_cache import TokenStore
from clipmapper.errors import UserError
from clipmapper.training.record_batches import RecordCaptions, RecordQuestions
from clipmapper.training.record_tokens import different_images

VOCABULARY = AnswerVocabulary(["red", "blue"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training_models.tiny_model(training_models.tiny_clip(tmp_path_factory.mktemp("clip"))).eval()


class Stored:
    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def read(self) -> Image.Image:
        return self.image


def records_in(folder: Path) -> list[Record]:
    """Six questions about three images: a file, bytes, and a row of a data set."""
    pictures = [np.random.default_rng(n).integers(0, 256, (50 + n, 80, 3), dtype=np.uint8) for n in range(3)]
    folder.mkdir(exist_ok=True)
    for n in range(2):
        Image.fromarray(pictures[n]).save(folder / f"{n}.png")
    images = [folder / "0.png", (folder / "1.png").read_bytes(), Stored(Image.fromarray(pictures[2]))]
    asked = ["what is it?", "what colour is the thing on the left?"]
    return [
        Record(n, images[n % 3], str(n % 3), asked[n % 2], ("red",), captions=("a b", "c d e"))
        for n in range(6)
    ]


@pytest.mark.parametrize("stored", [False, True])
def test_questions_have_the_tokens_of_their_own_image_and_text(model, tmp_path, stored):
    records = records_in(tmp_path)
    store = TokenStore(tmp_path / "cache" if stored else None, "float32", batch_size=2)
    cached = RecordQuestions(model, records, VOCABULARY, "train", store)
    plain = RecordQuestions(model, records, VOCABULARY, "train", None)
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
    records = records_in(tmp_path)[:3]
    found, wanted = (
        RecordCaptions(model, records, "train", store).batch([2, 0], ["a b", "c d e"])
        for store in (TokenStore(None, "float32"), None)
    )
    assert "images" not in found and found["references"] == wanted["references"]
    with torch.no_grad():
        tokens = model.encoder.image_tokens(wanted["images"])
    torch.testing.assert_close(found["image_tokens"], tokens, atol=1e-5, rtol=1e-5)


def test_files_are_known_by_their_content(model, tmp_path):
    def digest(folder: Path) -> str:
        return different_images(records_in_place(folder), model.encoder.preprocess(), tmp_path)[0].digest()

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
    images, _ = different_images(records, model.encoder.preprocess(), tmp_path)
    assert images.digest() == different_images(records[:3], images.transform, tmp_path)[0].digest()
    others = [records[0], records[1], Record(2, Stored(Image.new("RGB", (80, 52))), "2")]
    assert images.digest() != different_images(others, images.transform, tmp_path)[0].digest()


def test_a_later_run_finds_the_tokens_and_other_images_do_not(model, tmp_path):
    records, store = records_in(tmp_path / "images"), TokenStore(tmp_path / "cache")
    RecordQuestions(model, records, VOCABULARY, "train", store)
    kept = sorted(path.name for path in (tmp_path / "cache").glob("*-*"))
    assert len(kept) == 2
    RecordQuestions(model, records, VOCABULARY, "train", store)
    assert sorted(path.name for path in (tmp_path / "cache").glob("*-*")) == kept
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "0.png")
    changed = RecordQuestions(model, records, VOCABULARY, "train", store)
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2
    with torch.no_grad():
        wanted = model.encoder.image_tokens(changed.dataset[0][1][None])
    torch.testing.assert_close(changed.cache.images(torch.tensor([0])), wanted, atol=2e-2, rtol=2e-3)


def test_tokens_that_no_memory_holds_are_refused():
    with pytest.raises(UserError, match=r"tokens of the images take .* GB.*token_cache_folder"):
        TokenStore().tokens("images", dict, 10**12, (50, 768), lambda rows: None, lambda loaded: None)
