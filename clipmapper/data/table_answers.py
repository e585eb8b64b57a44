"""Answers of a table of questions, counted in whole columns."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipmapper.data.answers import FEW, RULES, AnswerVocabulary, most_frequent, normalised
from clipmapper.data.record_table import ROWS, RecordTable, as_numpy, unpacked


class _Counted(NamedTuple):
    """Different normalised answers of some records: arrays with an entry for each of a record's."""

    record: np.ndarray  # which of the records, from 0 on
    answer: np.ndarray  # which of the normalised answers
    count: np.ndarray  # how many people gave it
    first: np.ndarray  # who was the first
    people: np.ndarray  # how many answers the record has
    weight: np.ndarray  # of each record: how often the table has it


def vocabulary_of(table: RecordTable, least: int, rule: str) -> AnswerVocabulary:
    """As :func:`clipmapper.data.answers.answer_vocabulary` of the records' answers."""
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


def unknown_answers(table: RecordTable, vocabulary: AnswerVocabulary) -> list[str]:
    """How many questions the model can't get right, whatever it learns."""
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
    if not lost:
        return []
    return [f"validation: {lost} of {len(table)} questions have no answer among the {len(vocabulary)}"]


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
