"""The exceptions that stand for a user's mistakes."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the user gave: one line that says what was wrong and what is allowed.

    Command-line programs print the line and exit with status 2, without a traceback.
    """


class RunCutShort(UserError):
    """A run cannot go on (a full disk, a process that is gone), though its settings are right.

    Who catches it says what of the run is on the disk.
    """


class UserErrors(UserError):
    """Several mistakes, a line each. Programs print all ``lines`` and exit with status 2."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)
