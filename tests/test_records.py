"""Records, their images and their batches."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clipmapper.data.answer_rule import vqa_soft_accuracy
from clipmapper.data.answers import AnswerVocabulary, annotators, frequent_answers
from clipmapper.data.images import as_pil
from clipmapper.data.records import Record, RecordData, RecordDataset
from clipmapper.errors import UserError
from clipmapper.tasks.captioning.batches import CaptionCollate
from clipmapper.tasks.vqa.batches import VQACollate
from clipmapper.training.batches import epochs


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    return Image.fromarray(pixels)


class Stored:
    def __init__(self, image) -> None:
        self.image = image

    def read(self):
        return self.image


def test_an_image_is_a_path_bytes_or_fetched(tmp_path):
    halves().save(tmp_path / "a.png")
    data = encoded(halves())
    for image in (tmp_path / "a.png", data, Stored(data), Stored(halves())):
        found = Record(1, image, "a").pil()
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(halves()))


def test_bytes_are_turned_upright_by_exif():
    exif = Image.Exif()
    exif[0x112] = 6  # stored lying on its left side: the top of the picture is on the right
    found = as_pil(encoded(halves(), "JPEG", exif=exif, quality=95))
    assert found.size == (20, 40)
    assert np.asarray(found)[5, 10].argmax() == 0 and np.asarray(found)[35, 10].argmax() == 2


def test_an_unreadable_image_is_told_with_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"^my\.jsonl:3: image of 7 bytes: not a readable image"):
        Record(1, b"nothing", "a", source="my.jsonl:3").pil()
    with pytest.raises(UserError, match=r"^my\.jsonl:4: image=.*/b\.png: no such file$"):
        Record(1, tmp_path / "b.png", "b", source="my.jsonl:4").pil()
    cut = encoded(halves(200, 200), "JPEG")[:-300]
    with pytest.raises(UserError, match=r"not a readable image \(image file is truncated"):
        Record(1, cut, "c", source="my.jsonl:5").pil()


def test_targets_by_rule():
    answers = ["red"] * 5 + ["Dark red."] * 3 + ["the blue"] * 2
    wanted = {
        "soft": {"red": 1.0, "dark red": 0.9, "blue": 0.6},
        "thirds": {"red": 1.0, "dark red": 1.0, "blue": 2 / 3},
        "three": {"red": 1.0, "dark red": 1.0, "blue": 0.0},
    }
    for rule, scores in wanted.items():
        vocabulary = AnswerVocabulary(["blue", "green", "red", "dark red"], rule)
        expected = [scores["blue"], 0, scores["red"], scores["dark red"]]
        assert vocabulary.targets(answers).tolist() == pytest.approx(expected)
    assert AnswerVocabulary(["green"]).targets(answers).tolist() == [0]


@pytest.mark.parametrize("count", range(11))
def test_soft_targets_are_the_official_accuracy(count):
    answers = ["red"] * count + [f"answer{i}" for i in range(10 - count)]
    target = AnswerVocabulary(["red"]).targets(answers)[0]
    assert float(target) == pytest.approx(vqa_soft_accuracy("red", answers), abs=1e-6)


@pytest.mark.parametrize("answers", [["red"], ["Red", "red"], ["red", "blue"], ["red", "blue", "Blue"]])
def test_each_of_a_few_answers_is_right(answers):
    vocabulary = AnswerVocabulary(["red", "blue", "green"])
    right = [answer in {a.lower() for a in answers} for answer in vocabulary.answers]
    assert vocabulary.targets(answers).tolist() == right
    assert [vqa_soft_accuracy(a, annotators(answers)) for a in vocabulary.answers] == right


def test_frequent_answers_are_normalised_and_ordered():
    answers = ["Yes"] * 3 + ["yes."] * 2 + ["two"] * 4 + ["2"] + ["no"] * 4 + ["A"] * 9 + ["the dog"] * 2
    # "A" is an article, of which the official processing leaves nothing; it may be a choice as well.
    assert frequent_answers(answers, 3) == ["a", "2", "yes", "no"]
    assert frequent_answers(answers, 5) == ["a", "2", "yes"]


def read(record: Record) -> torch.Tensor:
    return torch.tensor(np.asarray(record.pil().resize((4, 4)))).permute(2, 0, 1)


def test_a_batch_of_questions():
    records = [
        Record(7, halves_bytes, "a", "what colour?", ("red",) * 10, "other"),
        Record("8", halves_bytes, "a", "is it red?", ("yes",), "yes/no"),
    ]
    collate = VQACollate(list, AnswerVocabulary(["yes", "red"]))
    dataset = RecordDataset(records, read)
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch["images"].shape == (2, 3, 4, 4) and batch["images"][0, :, 0, 0].argmax() == 0
    assert batch["text"] == ["what colour?", "is it red?"] and batch["targets"].tolist() == [[0, 1], [1, 0]]
    assert batch["answers"] == [["red"] * 10, ["yes"] * 4] and batch["families"] == ["other", "yes/no"]
    assert batch["ids"] == [7, "8"]


def test_a_batch_of_captions():
    record = Record(1, halves_bytes, "a", captions=("red and blue", "two halves"))
    batch = CaptionCollate(list)([RecordDataset([record], read)[0]], ["two halves"])
    assert batch["text"] == ["two halves"] and batch["references"] == [["red and blue", "two halves"]]
    assert batch["images"].shape == (1, 3, 4, 4) and batch["ids"] == [1]


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own():
    numbers_at = epochs(7, 4, seed=0)
    row = [number for step in range(14) for number in numbers_at(step)]  # batches go over ends of epochs
    orders = [tuple(row[start : start + 7]) for start in range(0, 56, 7)]
    assert all(sorted(order) == list(range(7)) for order in orders) and len(set(orders)) == 8
    assert epochs(7, 4, seed=0)(9) == row[36:40]  # of a run that is resumed there
    assert epochs(7, 4, seed=1)(0) != row[:4]


def test_data_says_what_it_is():
    records = [Record(i, b"", f"i{i // 2}", "q?", ("yes",), "b" if i else "a") for i in range(4)]
    data = RecordData({"train": records, "validation": records[:2]}, AnswerVocabulary(["yes"]), notes=["n"])
    assert data.kind == "questions" and data.families == ("a", "b") and data.answers == ("yes",)
    assert data.summary() == [
        "train: 2 images, 4 questions", "validation: 1 images, 2 questions", "1 answers", "n"
    ]  # fmt: skip
    told = [Record(1, b"", "a", captions=("x", "y"))]
    captions = RecordData({"train": told, "validation": [Record(2, b"", "b", captions=("z",))]}, None)
    assert captions.kind == "captions" and list(captions.wordings()) == ["x", "y", "z"]
    assert captions.summary()[0] == "train: 1 images, 2 captions"


halves_bytes = encoded(halves())
