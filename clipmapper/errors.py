"""The exceptions that stand for a user's mistakes."""

from collections.abc import Sequence

from clipmapper.visible_text import visible


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
