"""The lines above a figure: the question, the answer, and the truth where it is known."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from clipmapper.visual.layout import FAINT, Run, line_height, wrap, write_lines

_QUESTION_SIZE, _ANSWER_SIZE = 12.0, 10.0
_RIGHT, _WRONG = "#1b7a3d", "#b3261e"


class Header:
    """Question and answer (or a caption alone), wrapped to a width in inches; `height` is known before the
    figure is made."""

    def __init__(
        self,
        width: float,
        question: str,
        answer: str | None = None,
        score: float | None = None,
        truth: str | None = None,
    ) -> None:
        self._question = wrap([Run(question, weight="bold")], width, _QUESTION_SIZE)
        runs = [] if answer is None else _answer_runs(answer, score, truth)
        self._answer = wrap(runs, width, _ANSWER_SIZE)
        self._question_height = len(self._question) * line_height(_QUESTION_SIZE) + 0.05
        self.height = self._question_height + len(self._answer) * line_height(_ANSWER_SIZE)

    def write(self, figure: Figure, left: float, top: float) -> None:
        """Write the lines with their upper left corner at a place in inches."""
        write_lines(figure, left, top, self._question, _QUESTION_SIZE)
        write_lines(figure, left, top + self._question_height, self._answer, _ANSWER_SIZE)


def _answer_runs(answer: str, score: float | None, truth: str | None) -> Sequence[Run]:
    runs = [Run("answer:", FAINT), Run(answer, weight="bold")]
    if score is not None:
        runs.append(Run(f"(score {score:.3g})", FAINT))
    if truth is None:
        return runs
    agree = answer.strip().casefold() == truth.strip().casefold()
    mark = Run("✓", _RIGHT, "bold") if agree else Run("✗", _WRONG, "bold")
    return [*runs, Run("·  truth:", FAINT), Run(truth, weight="bold"), mark]
