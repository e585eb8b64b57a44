"""Data in which most questions have one of a few answers."""

from collections import Counter

import numpy as np
import pytest
from support import training_models
from support.photographs import photograph

from clipmapper.data.answers import AnswerVocabulary, usual_answers
from clipmapper.data.record import Record
from clipmapper.data.records import RecordData
from clipmapper.data.tables.builder import as_table
from clipmapper.tasks.vqa.batches import QuestionBatches, balanced_batches
from clipmapper.training.processes import Share

ANSWERS = ["yes"] * 60 + ["no"] * 30 + ["red"] * 8 + ["two"] * 2


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lopsided")
    photograph((255, 0, 0)).save(folder / "a.png")
    records = [Record(n, folder / "a.png", "a", f"what {n}?", (answer,)) for n, answer in enumerate(ANSWERS)]
    model = training_models.tiny_model(training_models.tiny_clip(folder))
    vocabulary = AnswerVocabulary(["yes", "no", "red"])  # "two" is too rare
    data = RecordData({"train": records, "validation": records[:2]}, vocabulary)
    return QuestionBatches(model, data, "train", data.splits["train"], None)


def test_the_answer_that_most_people_gave():
    people = [("a dog", "Dog.", "cat"), ("cat", "dog", "dog", "cat", "zebra"), ("zebra",), ("dog", "cat")]
    records = [Record(n, b"", str(n), "q?", answers) for n, answers in enumerate(people)]
    table = as_table(records)
    found = usual_answers(table, AnswerVocabulary(["dog", "cat"]))
    assert found.tolist() == [0, 1, -1, 0]  # of as many of each the one that came first
    assert usual_answers(table.take(np.array([3, 1])), AnswerVocabulary(["cat", "dog"])).tolist() == [1, 0]


def test_every_answer_is_asked_for_equally_often(batches):
    batch_at = balanced_batches(batches, batch_size=30, seed=3)
    ids = [one for step in range(20) for one in batch_at(step)["ids"]]
    counts = Counter(ANSWERS[one] for one in ids)
    assert set(counts) == {"yes", "no", "red"} and all(abs(count - 200) < 45 for count in counts.values())
    assert len({one for one in ids if ANSWERS[one] == "red"}) == 8  # all of its questions


def test_a_step_is_always_the_same_and_shares_are_its_parts(batches):
    batch_at = balanced_batches(batches, batch_size=10, seed=3)
    whole = batch_at(7)["ids"]
    assert whole == balanced_batches(batches, batch_size=10, seed=3)(7)["ids"] != batch_at(8)["ids"]
    parts = [batch_at(7, Share(index, 2))["ids"] for index in range(2)]
    assert sorted(map(int, parts[0] + parts[1])) == sorted(map(int, whole))
