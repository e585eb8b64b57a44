"""Several questions about an image in one batch, which encodes it once: the same numbers, other orders."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import training_models
from support.photographs import photograph

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.augment import Augmentation
from clipmapper.data.records import Record, RecordData
from clipmapper.tasks.vqa.batches import QuestionBatches, question_batches
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.batches import different_images, epochs
from clipmapper.training.processes import Share


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(2, 5), st.integers(0, 3))
def test_an_epoch_has_every_question_once_in_groups(images, together, seed):
    images, count = np.array(images) * 7, len(images)
    drawn = epochs(count, count, seed, images, together)
    for epoch in range(2):
        order = drawn(epoch)
        assert sorted(order) == list(range(count))
        # Cut where the image changes, or `together` of it have come: no more pieces than whole groups make.
        pieces, left = 1, together
        for before, after in pairwise(order):
            left -= 1
            if images[before] != images[after] or not left:
                pieces, left = pieces + 1, together
        assert pieces <= sum(-(-n // together) for n in Counter(images.tolist()).values())


def test_one_by_one_is_the_order_of_before():
    images = np.arange(30) // 3
    plain, grouped = epochs(30, 8, 1), epochs(30, 8, 1, images, 1)
    assert [plain(step) for step in range(9)] == [grouped(step) for step in range(9)]
    assert plain(0) == np.random.default_rng((1, 0)).permutation(30)[:8].tolist()
    assert epochs(30, 30, 1, images, 3)(0) != epochs(30, 30, 1, images, 3)(1)  # each epoch has its own


def test_groups_come_in_any_order():
    images = np.arange(60) // 3
    first = images[epochs(60, 60, 1, images, 3)(0)][::3]
    assert len(set(first.tolist())) == 20 and first.tolist() != sorted(first.tolist())


def test_the_different_images_of_some_rows():
    first, image_of = different_images(np.array([5, 5, 2, 9, 2]), [4, 0, 1, 2])
    assert first == [4, 0] and image_of.tolist() == [0, 1, 1, 0]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    for name in range(4):
        photograph((60 * name, 200, 255 - 60 * name)).save(folder / f"{name}.png")
    records = [
        Record(n, folder / f"{n % 4}.png", str(n % 4), f"what {n}?", ("yes" if n % 3 else "no",))
        for n in range(16)
    ]
    torch.manual_seed(0)
    model = training_models.tiny_model(training_models.tiny_clip(folder))
    data = RecordData({"train": records, "validation": records[:2]}, AnswerVocabulary(model.answers))
    return model, QuestionBatches(model, data, "train", data.splits["train"], None)


def test_a_shared_image_answers_as_one_of_its_own(asked):
    model, split = asked
    rows = torch.tensor([0, 4, 8, 1, 5, 2])
    module = VQAModule(model, 1e-3, 0.0, 1, 10, families=("other",)).eval()
    apart, shared = split.batch(rows), split.batch(rows, shared=True)
    assert len(shared["images"]) == 3 and shared["ids"] == apart["ids"] == rows.tolist()
    assert torch.equal(shared["images"][shared["image_of"]], apart["images"])
    torch.testing.assert_close(module.logits(shared), module.logits(apart))
    assert "image_of" in split.labelled_batch(range(5)) and "image_of" not in apart


def test_training_batches_encode_an_image_once(asked):
    split = asked[1]
    batch_at = question_batches(split, batch_size=8, seed=0, together=4)
    batch = batch_at(0)
    assert len(batch["images"]) == 2 and len(batch["ids"]) == 8
    assert "image_of" not in question_batches(split, batch_size=8, seed=0)(0)
    parts = [batch_at(0, Share(index, 2)) for index in range(2)]
    assert sorted(parts[0]["ids"] + parts[1]["ids"]) == sorted(batch["ids"])


def test_an_image_is_altered_alike_in_every_share(asked):
    model, split = asked
    alter = Augmentation("crop", model.encoder.clip.visual, 0)
    batch_at = question_batches(split, batch_size=8, seed=0, together=4)

    def altered(batch):
        images = alter(batch["images"], 3, batch["image_names"])
        return dict(zip(batch["ids"], images[batch["image_of"]], strict=True))

    whole = altered(batch_at(0))
    for part in (altered(batch_at(0, Share(index, 2))) for index in range(2)):
        assert all(torch.equal(image, whole[one]) for one, image in part.items())
    assert not torch.equal(
        alter(batch_at(0)["images"], 4, ["a", "b"]), alter(batch_at(0)["images"], 3, ["a", "b"])
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_the_optimiser_is_one_pass_where_an_encoder_is_trained(tmp_path, frozen):
    model = training_models.tiny_model(training_models.tiny_clip(tmp_path))
    model.encoder.frozen = frozen
    optimiser = VQAModule(model, 1e-3, 0.0, 1, 10, families=("other",)).configure_optimizers()["optimizer"]
    assert optimiser.defaults["fused"] is (None if frozen else True)
