"""Soft accuracy of answers to visual questions, as the official VQA scorer computes it.

Antol et al. 2015 (arXiv 1505.00468), Goyal et al. 2017 (arXiv 1612.00837). The rules are those of
`vqaEval.py` in GT-Vision-Lab/VQA at commit a013f00, its oddities included, because published numbers contain
them. LAVIS and OpenFlamingo normalise differently and give other numbers for the same predictions.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric

from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole

# No colon and no apostrophe: the official list leaves them alone. Full stops have their own rule.
_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# Officially "(?!<=\d)(\.)(?!\d)". The first group is a mistyped look-behind that never fails (so "3." loses
# its full stop too): leaving it out changes nothing.
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE, which is 32, where re.sub expects the number of replacements.
_FULL_STOPS_REMOVED = 32

_ZERO_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_ZERO_TO_TEN)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

# The official table maps a contraction that lacks exactly one apostrophe to the full form ("wouldnt've" and
# "wouldn'tve" to "wouldn't've"), so the full forms are enough. Left out, because they change nothing: the
# forms of "I" (words are in lower case by then), and let's and she's (mapped to themselves; the table has
# neither "lets" nor "shes").
_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
_CONTRACTION_OF = {
    full[:place] + full[place + 1 :]: full
    for full in _CONTRACTIONS.split()
    for place, character in enumerate(full)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table

# The metric adds up integers: their sum does not depend on how the questions are spread over processes, and
# they stay as they are when the model around the metric is cast to half precision. A score from n answers is
# a multiple of 1 / 3n, so in this unit it is exact for up to 16 answers a question.
_UNITS = 3 * math.lcm(*range(1, 17))


def normalise_answer(answer: str) -> str:
    """The official processing of an answer: punctuation, case, number words, articles, contractions.

    A punctuation mark becomes a space. It is dropped instead if the same mark stands next to a space anywhere
    in the answer, and all marks are dropped from an answer with a comma between two digits ("1,000"). A full
    stop goes unless a digit follows (the first 32 of them).

    Then lower case; "none" and "zero" to "ten" become digits; "a", "an" and "the" go; a contraction that
    lacks one apostrophe gets it back ("dont" becomes "don't"); single spaces between words.
    """
    answer = _strip(answer)
    text = answer
    grouped_digits = _DIGIT_COMMA_DIGIT.search(answer) is not None
    for mark in _PUNCTUATION.intersection(answer):
        dropped = grouped_digits or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    text = _FULL_STOP.sub("", text, count=_FULL_STOPS_REMOVED)
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def vqa_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How far the annotators support `prediction`, between 0 and 1.

    For each human answer `min(matches among the other answers / 3, 1)`, averaged over the human answers: with
    the ten answers of VQA and k matches, `min(0.3 k, 1)`. Only where the answers differ are they and the
    prediction normalised. Where they are unanimous the strings are compared as they stand, except for white
    space at the ends, tabs and newlines: "Yes" then scores 0 against ten times "yes".

    The rule holds for any number of answers from two on (with fewer than four, no prediction can reach 1). A
    single answer has no others to count matches among: the score is then 1 if the prediction equals it, both
    normalised, and else 0.

    Annotators are told apart by their place in `answers`. (The official code tells them apart by comparing
    their records, and its scores are too low where these have no `answer_id`.)

    Raises ValueError without answers, and for one string in place of a sequence of them.
    """
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of strings, not the string {answers!r}")
    if not answers:
        raise ValueError("a question needs at least one human answer")
    annotators = len(answers)
    if annotators == 1:
        return float(normalise_answer(prediction) == normalise_answer(answers[0]))
    distinct = Counter(_strip(answer) for answer in answers)
    process = _strip if len(distinct) == 1 else normalise_answer
    prediction = process(prediction)
    matches = sum(times for answer, times in distinct.items() if process(answer) == prediction)
    # An annotator who matches is not among their own others: these have one match fewer.
    thirds = matches * min(matches - 1, 3) + (annotators - matches) * min(matches, 3)
    return thirds / (3 * annotators)


def direct_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's accuracy of direct answers, min(k / 3, 1) with k matches (Schwenk et al. 2022, arXiv
    2206.01718).

    Both sides are normalised. (A-OKVQA's own code compares the strings as they stand, so that for it "two" is
    not "2".) Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("a question needs at least one human answer")
    prediction = normalise_answer(prediction)
    return min(sum(normalise_answer(answer) == prediction for answer in answers) / 3, 1.0)


class VQASoftAccuracy(Metric):
    """Mean `vqa_soft_accuracy` over questions, for all of them ("overall") and for each group.

    `groups` are the names of all groups, such as VQA's answer types ("yes/no", "number", "other"). They are
    fixed at construction, so that every process sums the same states: `compute` returns the mean over the
    questions of all processes, whatever the split. Values lie between 0 and 1 (the official scorer prints per
    cent). `score` may be another rule, whose scores are multiples of a third.

    Raises ValueError for a repeated group name and for a group called "overall".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: Int64[Tensor, "groups+1"]
    questions: Int64[Tensor, "groups+1"]

    def __init__(
        self,
        groups: Sequence[str] = (),
        score: Callable[[str, Sequence[str]], float] = vqa_soft_accuracy,
    ) -> None:
        super().__init__()
        self._score = score
        self._names = ("overall", *groups)
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"group names must differ, also from 'overall': {list(groups)}")
        self.add_state("scores", torch.zeros(len(self._names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("questions", torch.zeros(len(self._names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        groups: Sequence[str] | None = None,
    ) -> None:
        """Add questions: for each its predicted answer, its human answers and, if given, its group.

        Without `groups` the questions count in "overall" only. Raises ValueError, and adds nothing, for
        sequences of different lengths, for an unknown group, and where `vqa_soft_accuracy` does.
        """
        if len(answers) != len(predictions) or (groups is not None and len(groups) != len(predictions)):
            counts = f"{len(predictions)} predictions, {len(answers)} questions with answers"
            raise ValueError(counts + ("" if groups is None else f", {len(groups)} groups"))
        unknown = sorted(set(groups or ()) - set(self._names[1:]))
        if unknown:
            raise ValueError(f"unknown groups {unknown}: the groups are {list(self._names[1:])}")

        scores = [0] * len(self._names)
        questions = [0] * len(self._names)
        for index, (prediction, human) in enumerate(zip(predictions, answers, strict=True)):
            score = round(self._score(prediction, human) * _UNITS)
            for place in (0,) if groups is None else (0, self._names.index(groups[index])):
                scores[place] += score
                questions[place] += 1
        self.scores += torch.tensor(scores, device=self.scores.device)
        self.questions += torch.tensor(questions, device=self.questions.device)

    def compute(self) -> dict[str, Tensor]:
        """The means by name, "overall" first, as scalar float32 tensors; NaN where no question was seen."""
        # Divided as Python integers: float32 holds the sums only roughly, and not every device has float64.
        means = {
            name: score / (_UNITS * count) if count else math.nan
            for name, score, count in zip(
                self._names, self.scores.tolist(), self.questions.tolist(), strict=True
            )
        }
        return {
            name: torch.tensor(mean, dtype=torch.float32, device=self.scores.device)
            for name, mean in means.items()
        }


def mean_accuracy(scores: Sequence[float] | Float[np.ndarray, "questions"]) -> float:
    """The mean as :class:`VQASoftAccuracy` computes it, of scores of the questions (at least one)."""
    total = sum(round(score * _UNITS) for score in map(float, scores))
    return float(np.float32(total / (_UNITS * len(scores))))


def _strip(answer: str) -> str:
    """Strip an answer as the official scorer does with every one, also where it processes nothing else."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def write_results(path: Path, answers: Iterable[tuple[int | str, str]]) -> Path:
    """``[{"question_id": ..., "answer": ...}, ...]``, one for each question; returns the path."""
    entries = [{"question_id": number, "answer": answer} for number, answer in answers]
    return write_whole(path, json.dumps(entries))


def official_accuracy(results: Sequence[Mapping], annotations: Sequence[Mapping]) -> dict:
    """Per cent as ``vqaEval.py`` of GT-Vision-Lab/VQA prints it, rounded to two digits.

    ``results``: entries of a results file. ``annotations``: the list under that name in the official file.
    Returns ``overall``, ``perAnswerType`` and ``perQuestionType``, means over questions. Raises ``UserError``
    where not every question is answered exactly once.
    """
    answers = {entry["question_id"]: entry["answer"] for entry in results}
    wanted = {entry["question_id"] for entry in annotations}
    if len(answers) != len(results) or set(answers) != wanted:
        raise UserError(
            f"results: {len(results)} answers to {len(answers)} questions, of which "
            f"{len(wanted & set(answers))} are among the {len(wanted)} that are annotated; the official rule "
            "wants one answer to each"
        )
    scores: dict[str, dict[str, list[float]]] = {"perAnswerType": {}, "perQuestionType": {}}
    every = []
    for entry in annotations:
        people = [answer["answer"] for answer in entry["answers"]]
        score = vqa_soft_accuracy(answers[entry["question_id"]], people)
        every.append(score)
        for group, key in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
            scores[group].setdefault(entry[key], []).append(score)
    means = {
        group: {name: _per_cent(values) for name, values in by_name.items()}
        for group, by_name in scores.items()
    }
    return {"overall": _per_cent(every), **means}


def _per_cent(scores: Sequence[float]) -> float:
    return round(100 * float(np.mean(scores)), 2)


def write_captions_file(path: Path, captions: Iterable[tuple[int | str, str]]) -> Path:
    """``[{"image_id": ..., "caption": ...}, ...]``, one for each image; returns the path."""
    entries = [{"image_id": image, "caption": caption} for image, caption in captions]
    return write_whole(path, json.dumps(entries))
