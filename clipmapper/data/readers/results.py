"""Answers in the official upload format of VQA, and what the official scorer makes of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clipmapper.data.answer_rule import vqa_soft_accuracy
from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole


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
