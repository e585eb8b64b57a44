"""The exceptions that stand for a user's mistakes, and for the wish to stop."""

import re
from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the user gave: one line that says what was wrong and what is allowed.

    Command-line programs print the line and exit with status 2, without a traceback. What it quotes of a file
    cannot reach the terminal as a command: control characters are written out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class RunCutShort(UserError):
    """A run cannot go on (a full disk, a process that is gone), though its settings are right.

    Who catches it says what of the run is on the disk.
    """


class UserErrors(UserError):
    """Several mistakes, a line each. Programs print all ``lines`` and exit with status 2."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = [visible(line) for line in lines]
        super().__init__("\n".join(self.lines))


class RunInterrupted(Exception):
    """The user stopped the run. The message says what of it is on the disk."""


# Control characters but tab and line feed, line separators, what changes the order in which a terminal shows
# the letters beside it (a line of ours, too), annotation marks, and halves of surrogate pairs. Joiners stay:
# several scripts are written with them.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    """``text`` with what a terminal would obey written out: ``\\x1b``, ``\\u202e``; tabs and line feeds stay.

    Escape sequences move the cursor, recolour, retitle or type for the reader; bidi controls turn the order
    of letters round; lone halves of surrogate pairs cannot be printed at all.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
