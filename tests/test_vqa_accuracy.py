"""VQA soft accuracy: against the official scorer's output, and worked out by hand."""

import gzip
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipmapper.data.answer_rule import VQASoftAccuracy, normalise_answer, vqa_soft_accuracy

OFFICIAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "vqa_v2_subset"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="needs ../shared/data/vqa_v2_subset")

ANSWER_TYPES = ("yes/no", "number", "other")


def _ten(answer: str, times: int) -> list[str]:
    """Ten answers of which `times` are `answer` and the rest differ from it and from each other."""
    return [answer] * times + [f"else{chr(97 + i)}" for i in range(10 - times)]


# ---- normalise_answer


@needs_official
def test_every_line_of_the_official_normalisation_table():
    with gzip.open(OFFICIAL / "normalisation_table.jsonl.gz", "rt", encoding="utf-8") as lines:
        table = [json.loads(line) for line in lines]
    assert len(table) == 12_112
    wrong = [(raw, official, ours) for raw, official in table if (ours := normalise_answer(raw)) != official]
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ""),
        ("  Blue\t", "blue"),
        ("red\nand\tgreen", "red and green"),
        # a mark within a word becomes a space; next to a space it goes, and then everywhere in the answer
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),
        ("t-shirt, blue", "t shirt blue"),
        ("what?!", "what"),
        ('!?[]{}()=+_-><@`";/\\,', ""),
        # the ends were stripped before: a mark there touches no space
        (" -5", "5"),
        # digit-comma-digit drops every mark
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("a,b", "b"),
        # neither colon nor apostrophe are on the list
        ("10:55", "10:55"),
        ("man's", "man's"),
        # full stops: kept only before a digit
        ("yes.", "yes"),
        ("3.", "3"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("u.s.a", "usa"),
        ("." * 40, "." * 8),
        # number words, whole words only, up to ten
        ("None", "0"),
        ("zero one two three four five", "0 1 2 3 4 5"),
        ("six seven eight nine ten", "6 7 8 9 10"),
        ("eleven someone twenty-one", "eleven someone twenty 1"),
        # articles
        ("The man on a horse and an owl", "man on horse and owl"),
        ("the", ""),
        ("theatre", "theatre"),
        # contractions
        ("Dont", "don't"),
        ("isnt it", "isn't it"),
        ("wouldnt've", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"),
        ("wouldntve", "wouldntve"),
        ("yalld've y'alld've", "yalld've y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("let's lets she's shes hes", "let's lets she's shes he's"),
        ("Im ive id've", "im ive id've"),
    ],
)
def test_normalisation_worked_out_by_hand(answer, expected):
    assert normalise_answer(answer) == expected


# ---- vqa_soft_accuracy


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_matches_of_ten(matches, expected):
    assert vqa_soft_accuracy("cat", _ten("cat", matches)) == pytest.approx(expected, abs=1e-12)


def test_both_sides_are_processed_where_the_answers_differ():
    assert vqa_soft_accuracy("The Cat!", _ten("cat", 9)) == 1
    assert vqa_soft_accuracy("cat", _ten("a  CAT.", 9)) == 1
    # "2" and "two" become the same answer
    assert vqa_soft_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1
    assert vqa_soft_accuracy("2", ["two", "2", *_ten("", 0)[:8]]) == pytest.approx(0.6)


def test_unanimous_answers_are_compared_as_they_stand():
    assert vqa_soft_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_soft_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_soft_accuracy("yes.", ["yes"] * 10) == 0
    assert vqa_soft_accuracy("2", ["two"] * 10) == 0
    assert vqa_soft_accuracy("The Cat", ["The Cat"] * 10) == 1
    # white space is cleaned before unanimity is decided, on both sides
    assert vqa_soft_accuracy(" red\tcar\n", ["red car"] * 5 + ["red\ncar "] * 5) == 1
    assert vqa_soft_accuracy("Red car", ["red car"] * 5 + ["red\ncar "] * 5) == 0


def test_other_numbers_of_answers():
    assert vqa_soft_accuracy("The Cat", ["cat"]) == 1
    assert vqa_soft_accuracy("dog", ["cat"]) == 0
    # two who agree: each has one other who matches
    assert vqa_soft_accuracy("cat", ["cat", "cat"]) == pytest.approx(1 / 3)
    # one of two: 0 others match for the first, 1 for the second
    assert vqa_soft_accuracy("cat", ["cat", "dog"]) == pytest.approx(1 / 6)
    # three of five: (2 + 2 + 2 + 3 + 3) / 3 / 5
    assert vqa_soft_accuracy("cat", ["cat", "dog", "cat", "cow", "cat"]) == pytest.approx(12 / 15)


WORDS = st.sampled_from(["yes", "Yes", "no", "two", "2", "a cat", "cat."])


@given(WORDS, st.lists(WORDS, min_size=2, max_size=12))
def test_leaving_out_each_annotator_in_turn(prediction, answers):
    prepared = [prediction, *answers]
    if len(set(answers)) > 1:
        prepared = [normalise_answer(text) for text in prepared]
    predicted, *human = prepared
    scores = [
        min(1.0, (human[:left_out] + human[left_out + 1 :]).count(predicted) / 3)
        for left_out in range(len(human))
    ]
    assert vqa_soft_accuracy(prediction, answers) == pytest.approx(math.fsum(scores) / len(scores), abs=1e-12)


def test_answers_that_are_none():
    with pytest.raises(ValueError, match="at least one"):
        vqa_soft_accuracy("cat", [])
    with pytest.raises(ValueError, match="not the string 'cat'"):
        vqa_soft_accuracy("c", "cat")


# ---- VQASoftAccuracy


def _questions(count: int, seed: int) -> list[tuple[str, list[str], str]]:
    generator = random.Random(seed)
    words = ["yes", "no", "Two", "2", "a cat", "cat"]
    return [
        (
            generator.choice(words),
            generator.choices(words, k=generator.choice([1, 3, 7, 10])),
            generator.choice(ANSWER_TYPES),
        )
        for _ in range(count)
    ]


def _metric_of(questions: list[tuple[str, list[str], str]]) -> VQASoftAccuracy:
    metric = VQASoftAccuracy(groups=ANSWER_TYPES)
    predictions, answers, groups = zip(*questions, strict=True)
    metric.update(predictions, answers, groups)
    return metric


def _values(metric: VQASoftAccuracy) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_metric_is_the_mean_of_the_function():
    questions = _questions(60, seed=1)
    scores = defaultdict(list)
    for prediction, answers, group in questions:
        scores["overall"].append(vqa_soft_accuracy(prediction, answers))
        scores[group].append(vqa_soft_accuracy(prediction, answers))
    assert len({len(of_group) for of_group in scores.values()}) > 1  # else a mean of means would pass
    computed = _metric_of(questions).compute()
    assert list(computed) == ["overall", *ANSWER_TYPES]
    for name, value in computed.items():
        assert value.dtype == torch.float32 and value.shape == ()
        assert value.item() == pytest.approx(math.fsum(scores[name]) / len(scores[name]), rel=1e-6)


def test_metric_by_hand():
    metric = VQASoftAccuracy(groups=("number", "other"))
    answers = [_ten("two", 2), _ten("cat", 4), _ten("cat", 4)]
    metric.update(["2", "cat", "dog"], answers, ["number", "other", "other"])
    assert _values(metric) == pytest.approx({"overall": 1.6 / 3, "number": 0.6, "other": 0.5})
    metric.reset()
    metric.update(["2"], [_ten("two", 1)], ["number"])
    computed = _values(metric)
    assert (computed["overall"], computed["number"]) == pytest.approx((0.3, 0.3))
    assert math.isnan(computed["other"])


def test_metric_without_groups():
    metric = VQASoftAccuracy()
    metric.update(["cat", "dog"], [_ten("cat", 3), _ten("cat", 3)])
    assert _values(metric) == pytest.approx({"overall": 0.45})
    metric = VQASoftAccuracy(groups=("other",))
    metric.update(["cat"], [_ten("cat", 1)])
    metric.update(["cat"], [_ten("cat", 3)], ["other"])
    assert _values(metric) == pytest.approx({"overall": 0.6, "other": 0.9})


def test_split_updates_equal_one_update():
    questions = _questions(50, seed=2)
    whole = _values(_metric_of(questions))
    split = VQASoftAccuracy(groups=ANSWER_TYPES)
    for start in range(0, 50, 7):
        predictions, answers, groups = zip(*questions[start : start + 7], strict=True)
        split.update(list(predictions), list(answers), list(groups))
    split.update([], [], [])
    assert _values(split) == whole


def test_merged_states_give_the_pooled_result():
    questions = _questions(50, seed=3)
    pooled = _values(_metric_of(questions))
    shares = questions[:11], questions[11:]
    # unequal shares, so that the mean of the two processes' means is another number
    means = [_values(_metric_of(share))["overall"] for share in shares]
    assert sum(means) / 2 != pytest.approx(pooled["overall"])
    first, second = map(_metric_of, shares)
    first.merge_state(second)
    assert _values(first) == pooled


def test_synchronised_processes_give_the_pooled_result():
    questions = _questions(50, seed=4)
    first, second = _metric_of(questions[:11]), _metric_of(questions[11:])
    of_second = iter([second.scores, second.questions])  # states are gathered in the order they were added
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda state, group: [state, next(of_second)]
    assert _values(first) == _values(_metric_of(questions))


def test_casting_the_module_around_it_does_not_touch_the_sums():
    questions = _questions(300, seed=5)
    metric = _metric_of(questions)
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    predictions, answers, groups = zip(*questions, strict=True)
    metric.update(predictions, answers, groups)
    assert _values(metric) == _values(_metric_of(questions))


def test_metric_refuses_and_adds_nothing():
    metric = VQASoftAccuracy(groups=("number", "other"))
    metric.update(["cat"], [_ten("cat", 3)], ["other"])
    before = metric.scores.clone(), metric.questions.clone()
    with pytest.raises(ValueError, match=r"unknown groups \['yes/no'\].*\['number', 'other'\]"):
        metric.update(["cat", "yes"], [_ten("cat", 3)] * 2, ["other", "yes/no"])
    with pytest.raises(ValueError, match="unknown groups"):
        metric.update(["cat"], [_ten("cat", 3)], ["overall"])
    with pytest.raises(ValueError, match="2 predictions, 1 questions"):
        metric.update(["cat", "dog"], [_ten("cat", 3)])
    with pytest.raises(ValueError, match="1 groups"):
        metric.update(["cat", "dog"], [_ten("cat", 3)] * 2, ["other"])
    with pytest.raises(ValueError, match="at least one"):
        metric.update(["cat", "dog"], [_ten("cat", 3), []], ["other", "other"])
    assert torch.equal(metric.scores, before[0]) and torch.equal(metric.questions, before[1])


@pytest.mark.parametrize("groups", [("overall",), ("other", "other")])
def test_group_names_must_differ(groups):
    with pytest.raises(ValueError, match="must differ"):
        VQASoftAccuracy(groups=groups)


# ---- against the official scorer


@needs_official
def test_official_results_file():
    expected = json.loads((OFFICIAL / "expected_test.json").read_text())
    results = json.loads((OFFICIAL / "results_test.json").read_text())
    predicted = {result["question_id"]: result["answer"] for result in results}
    with gzip.open(OFFICIAL / "vqa_annotatons_test.json.gz", "rt", encoding="utf-8") as file:
        annotations = json.load(file)["annotations"]
    assert len(annotations) == len(expected["evalQA"]) == 2_962

    answers = [[answer["answer"] for answer in annotation["answers"]] for annotation in annotations]
    predictions = [predicted[annotation["question_id"]] for annotation in annotations]
    percent = {
        str(annotation["question_id"]): round(100 * vqa_soft_accuracy(prediction, human), 2)
        for annotation, prediction, human in zip(annotations, predictions, answers, strict=True)
    }
    assert {key: score for key, score in percent.items() if score != expected["evalQA"][key]} == {}

    by_answer_type = VQASoftAccuracy(groups=ANSWER_TYPES)
    by_answer_type.update(predictions, answers, [annotation["answer_type"] for annotation in annotations])
    rounded = {name: round(100 * value, 2) for name, value in _values(by_answer_type).items()}
    assert rounded == {"overall": 71.20, "yes/no": 77.37, "number": 70.20, "other": 65.74}

    question_types = [annotation["question_type"] for annotation in annotations]
    by_question_type = VQASoftAccuracy(groups=sorted(set(question_types)))
    by_question_type.update(predictions, answers, question_types)
    rounded = {name: 100 * value for name, value in _values(by_question_type).items() if name != "overall"}
    assert rounded == pytest.approx(expected["accuracy"]["perQuestionType"], abs=0.00501)
