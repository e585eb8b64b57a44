"""The annotations of VQA v2 in columns: half a million dictionaries would take gigabytes."""

from array import array
from collections import Counter
from collections.abc import Sequence

from clipmapper.data.answers import normalised

_UNSAID = -1  # images are numbered from 0


class Annotations:
    """Answers, answer type and image of questions.

    ``usual``: how often each normalised answer is a question's ``multiple_choice_answer`` or, where it has
    none, its most frequent answer.
    """

    def __init__(self) -> None:
        self.usual: Counter[str] = Counter()
        self._rows: dict[int, int] = {}
        self._texts: dict[str, int] = {}
        self._names: list[str] = []
        self._answers, self._starts, self._kinds = array("i"), array("q", [0]), array("i")
        self._images = array("q")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, question: int) -> bool:
        return question in self._rows

    def add(
        self, question: int, answers: Sequence[str], kind: str, usual: str | None, image: int | None
    ) -> bool:
        """Whether the question was not there before."""
        if question in self._rows:
            return False
        self._rows[question] = len(self._rows)
        self._answers.extend(map(self._number, answers))
        self._starts.append(len(self._answers))
        self._kinds.append(self._number(kind))
        self._images.append(_UNSAID if image is None else image)
        if usual is None:
            usual = Counter(map(normalised, answers)).most_common(1)[0][0]
        self.usual[normalised(usual)] += 1
        return True

    def of(self, question: int) -> tuple[tuple[str, ...], str, int | None]:
        """The answers to a question, its answer type and its image, if the annotation says which."""
        row = self._rows[question]
        answers = self._answers[self._starts[row] : self._starts[row + 1]]
        image = None if self._images[row] == _UNSAID else self._images[row]
        return tuple(self._names[number] for number in answers), self._names[self._kinds[row]], image

    def _number(self, text: str) -> int:
        number = self._texts.setdefault(text, len(self._texts))
        if number == len(self._names):
            self._names.append(text)
        return number
