"""The answers that a model can give, and how right each is by what people answered."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.data.answer_rule import (
    direct_answer_accuracy,
    normalise_answer,
    vqa_soft_accuracy,
)
from clipmapper.data.tables.base import unpacked
from clipmapper.data.tables.columns import ROWS, RecordTable, as_numpy

FEW = 4  # with fewer human answers than this no prediction could reach 1 by the official rule

# How right an answer is that n annotators gave.
RULES = {
    # Anderson et al. 2018 (arXiv 1707.07998): with ten annotators the official accuracy of the answer.
    "soft": lambda n: min(0.3 * n, 1.0),
    # Antol et al. 2015 (arXiv 1505.00468), without leaving one annotator out; A-OKVQA's rule too.
    "thirds": lambda n: min(n / 3, 1.0),
    # Antol et al.: an answer is right when at least three people gave it; here nothing else counts.
    "three": lambda n: float(n >= 3),
}

# How right a prediction is, given the human answers.
ACCURACIES = {"vqa": vqa_soft_accuracy, "a_okvqa": direct_answer_accuracy}


class AnswerVocabulary:
    """Answers in the order of the logits, and the targets that human answers make of them.

    Parameters: ``answers``, normalised by :func:`clipmapper.data.answer_rule.normalise_answer`;
    ``rule``, a key of :data:`RULES`. Human answers are normalised before they are counted. (The usual code,
    hengyuan-hu/bottom-up-attention-vqa, counts them raw, and so loses those that differ in a full stop.)

    With fewer than four human answers every one of them is right: the rules are made for ten.
    """

    def __init__(self, answers: Sequence[str], rule: str = "soft") -> None:
        self.answers = tuple(answers)
        self.rule = rule
        self.index = {answer: i for i, answer in enumerate(self.answers)}

    def __len__(self) -> int:
        return len(self.answers)

    def __contains__(self, answer: str) -> bool:
        return answer in self.index

    def targets(self, answers: Sequence[str]) -> Float[Tensor, "answers"]:
        """How right every answer of the vocabulary is; all 0 where nobody gave one of them."""
        targets = torch.zeros(len(self.answers))
        for answer, score in answer_scores(answers, self.rule).items():
            if answer in self.index:
                targets[self.index[answer]] = score
        return targets


def answer_scores(answers: Sequence[str], rule: str) -> dict[str, float]:
    """Score each different human answer, normalised: how right is it by this rule?"""
    counts = Counter(normalised(answer) for answer in answers)
    if len(answers) < FEW:
        return dict.fromkeys(counts, 1.0)
    return {answer: RULES[rule](count) for answer, count in counts.items()}


def annotators(answers: Sequence[str]) -> list[str]:
    """Human answers as the official accuracy takes them: as they are, or, of fewer than four, each different
    one four times, by which the official rule gives 1 to every one of them and 0 to all else."""
    if len(answers) >= FEW:
        return list(answers)
    return [answer for answer in dict.fromkeys(map(normalised, answers)) for _ in range(FEW)]


def frequent_answers(answers: Iterable[str], least: int) -> list[str]:
    """Normalised answers that occur at least ``least`` times, the most frequent first.

    For VQA v2 the usual list has the answers that are the ``multiple_choice_answer`` of at least 9 questions
    of train and val: 3129.
    """
    return most_frequent(Counter(normalised(answer) for answer in answers), least)


def most_frequent(counts: Mapping[str, int], least: int) -> list[str]:
    """Normalised answers that were counted at least ``least`` times, the most frequent first."""
    kept = [answer for answer, count in counts.items() if answer and count >= least]
    return sorted(kept, key=lambda answer: (-counts[answer], answer))


def counted_answers(of_question: Sequence[str]) -> list[str]:
    """Return what a question's human answers (at least one) count for among the answers of a data set.

    The most frequent one, normalised (of several the one that was given first), as VQA's own
    ``multiple_choice_answer`` is made; with fewer than four human answers each of them.
    """
    counts = Counter(map(normalised, of_question))
    return list(counts) if len(of_question) < FEW else [counts.most_common(1)[0][0]]


@lru_cache(maxsize=1_000_000)
def normalised(answer: str) -> str:
    """:func:`normalise_answer`, remembered: a few thousand answers make up most of a data set.

    An answer of which the official processing leaves nothing (the choice "A" is an article) stays, in lower
    case.
    """
    return normalise_answer(answer) or " ".join(answer.lower().split())


def settled(answer: str) -> str:
    """:func:`normalised` until nothing changes any more: once need not be enough."""
    for _ in range(10):
        if (found := normalised(answer)) == answer:
            break
        answer = found
    return answer


class _Counted(NamedTuple):
    """Different normalised answers of some records: arrays with an entry for each of a record's."""

    record: np.ndarray  # which of the records, from 0 on
    answer: np.ndarray  # which of the normalised answers
    count: np.ndarray  # how many people gave it
    first: np.ndarray  # who was the first
    people: np.ndarray  # how many answers the record has
    weight: np.ndarray  # of each record: how often the table has it


def answer_vocabulary(table: RecordTable, least: int, rule: str) -> AnswerVocabulary:
    """Make the vocabulary of training questions: what counts (:func:`counted_answers`) often enough."""
    names, numbers = _normalised(table)
    counts = np.zeros(len(names), np.int64)
    for found in _counted(table, numbers):
        order = np.lexsort((found.first, -found.count, found.record))
        _, places = np.unique(found.record[order], return_index=True)
        usual = order[places]
        few = found.people < FEW
        chosen = np.concatenate([usual[~few[usual]], np.flatnonzero(few)])
        np.add.at(counts, found.answer[chosen], found.weight[found.record[chosen]])
    again: Counter[str] = Counter()
    for name, count in zip(names, counts.tolist(), strict=True):
        if count:
            again[normalised(name)] += count
    return AnswerVocabulary(most_frequent(again, least), rule)


def usual_answers(table: RecordTable, vocabulary: AnswerVocabulary) -> Int[np.ndarray, "records"]:
    """The answer that most people gave to each question, by its place in the vocabulary; -1: it is not there.

    Of several the one that was given first.
    """
    names, numbers = _normalised(table)
    place = np.array([vocabulary.index.get(name, -1) for name in names], np.int64)
    usual = np.full(table.columns.count, -1, np.int64)
    for part, found in enumerate(_counted(table, numbers)):
        order = np.lexsort((found.first, -found.count, found.record))
        records, first = np.unique(found.record[order], return_index=True)
        usual[part * ROWS + records] = place[found.answer[order[first]]]
    return usual[table.rows]


def unknown_answers(table: RecordTable, vocabulary: AnswerVocabulary) -> list[str]:
    """How many questions the model can't get right, whatever it learns."""
    lost = questions_without_answer(table, vocabulary)
    if not lost:
        return []
    return [f"validation: {lost} of {len(table)} questions have no answer among the {len(vocabulary)}"]


def questions_without_answer(table: RecordTable, vocabulary: AnswerVocabulary) -> int:
    """Count the questions of which no answer of the vocabulary is right in the least."""
    names, numbers = _normalised(table)
    known = np.array([name in vocabulary for name in names], bool)
    lost = 0
    for found in _counted(table, numbers):
        longest = int(found.count.max(initial=0))
        scores = np.array([RULES[vocabulary.rule](count) for count in range(longest + 1)])
        right = known[found.answer] & ((found.people < FEW) | (scores[found.count] > 0))
        fine = np.zeros(len(found.weight), bool)
        fine[found.record[right]] = True
        lost += int(found.weight[~fine].sum())
    return lost


def _normalised(table: RecordTable) -> tuple[list[str], np.ndarray]:
    """The different normalised texts of the table's columns, and which of them each text is."""
    names: dict[str, int] = {}
    numbers = [
        names.setdefault(normalised(unpacked(text)), len(names))
        for part in table.columns.texts.parts
        for text in part.to_pylist()
    ]
    return list(names), np.array(numbers, np.int64)


def _counted(table: RecordTable, normal: np.ndarray) -> Iterator[_Counted]:
    times = np.bincount(table.rows, minlength=table.columns.count)
    kinds = max(1, int(normal.max(initial=0)) + 1)
    for number, (offsets, values) in enumerate(table.columns.records["answers"].lists()):
        weight = times[number * ROWS : (number + 1) * ROWS]
        people = np.diff(offsets)
        record = np.repeat(np.arange(len(people)), people)
        answer = normal[as_numpy(values)]
        place = np.arange(len(record))
        used = weight[record] > 0
        key, index, count = np.unique(
            record[used] * kinds + answer[used], return_index=True, return_counts=True
        )
        record_of, answer_of = np.divmod(key, kinds)
        yield _Counted(record_of, answer_of, count, place[used][index], people[record_of], weight)
