"""Problems of a data set: everything is found before anything is said."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipmapper.errors import UserErrors

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """``source``: file and line. ``kind``: what problems are counted by. ``detail``: what is behind it."""

    source: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        said = f"{self.kind}: {self.detail}" if self.detail else self.kind
        return f"{self.source}: {said}"


def stop_for(problems: Sequence[Problem]) -> None:
    """Raise ``UserErrors`` with the first 20 problems, a line each, and how many of each kind come after."""
    if not problems:
        return
    lines = [str(problem) for problem in problems[:_SHOWN]]
    rest = Counter(problem.kind for problem in problems[_SHOWN:])
    if rest:
        counts = ", ".join(f"{count} x {kind}" for kind, count in rest.most_common())
        lines.append(f"and {rest.total()} more: {counts}")
    raise UserErrors(lines)
