"""A model that answers, on any questions: accuracy, mistakes, whether its probabilities hold."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from rich.table import Table
from torchmetrics.functional.classification import binary_calibration_error

from clipmapper.data.answer_rule import mean_accuracy, write_results
from clipmapper.data.answers import annotators, normalised
from clipmapper.evaluation.statistics import bootstrap_interval
from clipmapper.models.tokens import tokenize
from clipmapper.training.evaluated import Evaluation
from clipmapper.training.measures import OVERALL, Measure, Measures

_CONFUSIONS = 20
_RIGHT = 0.5  # an accuracy from which on an answer counts as right, where it has to be right or wrong
_BINS, _NORM = 15, "l1"  # of the expected calibration error, as Guo et al. 2017 (arXiv 1706.04599) have it
_PROBABILITIES = ("softmax", "sigmoid")


class AnswerEvaluation(Evaluation):
    """What is said of a question: [row of the answer, its softmax over answers, its sigmoid]. The model is
    trained by the sigmoid; explanations show the softmax."""

    file, noun = "answers", "questions"
    titles: ClassVar = {"accuracy": ("accuracy", 100)}

    @property
    def rounds(self) -> bool:
        # (Training can keep no tokens of texts that have one behind them.)
        return super().rounds and not self.model.encoder.text_tower.appended_class_token

    def batch(self, rows: Sequence[int]) -> dict:
        asked = [self.records[row].question for row in rows]
        return self.pictures(rows) | {"text": tokenize(self.model.encoder.tokenizer, asked)}

    def said(self, batch: Mapping) -> list:
        text = batch["text"].to(self.model.device)
        images = self.image_tokens(batch)
        with self.first_stage():
            words = self.kept(self.model.encoder.text_tokens(text.ids, text.valid))
        with self.second_stage():
            logits = self.model.answer_logits(images, words, text.valid)
        best = logits.argmax(dim=1)
        exact = logits.double()
        probabilities = (
            of_all.gather(1, best[:, None])[:, 0].tolist()
            for of_all in (exact.softmax(dim=1), exact.sigmoid())
        )
        return [list(row) for row in zip(best.tolist(), *probabilities, strict=True)]

    def scored(self) -> np.ndarray:
        return np.flatnonzero(self.records.lengths("answers"))

    def write(self, said: Sequence, path: Path) -> Path:
        answers = (self.model.answers[row] for row, *_ in said)
        return write_results(path, zip((record.id for record in self.records), answers, strict=True))

    def _accuracies(self, said: Sequence) -> Float[np.ndarray, "scored"]:
        answers = self.model.answers
        return np.array([
            self.data.accuracy(answers[said[row][0]], annotators(self.records[row].answers))
            for row in self.scored().tolist()
        ], dtype=np.float64)  # fmt: skip

    def measures(self, said: Sequence) -> Measures:
        accuracies, families = self._accuracies(said), self.records.families[self.scored()]
        some = self.records.take(self.scored())
        groups = {some.family_name(number): families == number for number in some.family_numbers()}
        groups[OVERALL] = np.ones(len(accuracies), bool)
        return {
            name: {"accuracy": Measure(mean_accuracy(accuracies[flags]), accuracies[flags][:, None])}
            for name, flags in groups.items()
        }

    def more(self, said: Sequence, confidence: float, seed: int) -> dict:
        accuracies, scored = self._accuracies(said), self.scored().tolist()
        known = set(map(normalised, self.model.answers))
        possible, confusions = [], Counter()
        for row, accuracy in zip(scored, accuracies.tolist(), strict=True):
            people = Counter(map(normalised, self.records[row].answers))
            possible.append(not known.isdisjoint(people))
            usual, answer = people.most_common(1)[0][0], self.model.answers[said[row][0]]
            if accuracy < _RIGHT and normalised(answer) != usual:
                confusions[answer, usual] += 1
        interval = partial(_interval, confidence=confidence, seed=seed)
        flags = np.array(possible, bool)
        order = sorted(confusions, key=lambda pair: (-confusions[pair], pair))
        return {
            "answers the model can give": len(self.model.answers),
            "no answer that it can give": interval(accuracies[~flags]),
            "an answer that it can give": interval(accuracies[flags]),
            "wrong": int((accuracies < _RIGHT).sum()),
            "confusions": [
                {"said": said_, "for": usual, "times": confusions[said_, usual]}
                for said_, usual in order[:_CONFUSIONS]
            ],
            "calibration": {"bins": _BINS, "norm": _NORM, "right": f"an accuracy of {_RIGHT:g} or more"}
            | {
                name: calibration(np.array([said[row][1 + column] for row in scored]), accuracies >= _RIGHT)
                for column, name in enumerate(_PROBABILITIES)
            },
        }

    def shown(self, name: str, more: Mapping) -> Iterator[str | Table]:
        lost, others = more["no answer that it can give"], more["an answer that it can give"]
        count = lost["questions"] + others["questions"]
        line = f"{name}: {lost['questions']:,} of {count:,} questions have no answer that the model can give"
        if lost["questions"]:
            rest = f"; {100 * others['mean']:.1f} % of the others" if others["questions"] else ""
            line += f": {100 * lost['mean']:.1f} % of them are right{rest}"
        yield line
        errors = " and ".join(
            f"{100 * more['calibration'][kind]['error']:.1f} % ({kind})" for kind in _PROBABILITIES
        )
        yield f"{name}: expected calibration error of its answers ({_BINS} bins, {_NORM}): {errors}"
        if more["confusions"]:
            title = f"{name}: the most frequent mistakes"
            table = Table(title=title, title_justify="left", min_width=min(len(title), 110))
            for column, side in (("said", "left"), ("for", "left"), ("times", "right")):
                table.add_column(column, justify=side)
            for row in more["confusions"]:
                table.add_row(row["said"], row["for"], str(row["times"]))
            yield table


def calibration(probabilities: Float[np.ndarray, "questions"], right: Bool[np.ndarray, "questions"]) -> dict:
    """``error``: expected calibration error; ``reliability``: of every bin that has answers their mean
    probability and the share of them that are right."""
    below = torch.from_numpy(probabilities).clamp(max=1 - 2**-40)  # 1 would be a bin of its own
    error = binary_calibration_error(below, torch.from_numpy(right).long(), n_bins=_BINS, norm=_NORM)
    ends = torch.linspace(0, 1, _BINS + 1, dtype=below.dtype)
    bins = (torch.bucketize(below, ends, right=True) - 1).numpy()
    reliability = [
        {
            "from": float(ends[number]),
            "to": float(ends[number + 1]),
            "questions": int((bins == number).sum()),
            "probability": float(probabilities[bins == number].mean()),
            "right": float(right[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]
    return {"error": float(error), "reliability": reliability}


def _interval(values: Float[np.ndarray, "questions"], confidence: float, seed: int) -> dict:
    found = {"questions": len(values)}
    if len(values):
        found |= bootstrap_interval(values, confidence=confidence, seed=seed).as_dict()
    return found
