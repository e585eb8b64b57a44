"""The answers that a model can give, and how right each is by what people answered."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.evaluation.vqa_accuracy import (
    direct_answer_accuracy,
    normalise_answer,
    vqa_soft_accuracy,
)

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

    Parameters: ``answers``, normalised by :func:`clipmapper.evaluation.vqa_accuracy.normalise_answer`;
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
    """Of each different human answer, normalised, how right it is."""
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


def answer_vocabulary(answers: Iterable[Sequence[str]], least: int, rule: str) -> AnswerVocabulary:
    """The vocabulary of training questions, given all human answers of each.

    What a question counts for: :func:`counted_answers`.
    """
    counted = [answer for of_question in answers for answer in counted_answers(of_question)]
    return AnswerVocabulary(frequent_answers(counted, least), rule)


def counted_answers(of_question: Sequence[str]) -> list[str]:
    """What the human answers to a question, at least one, count for among the answers of a data set.

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
