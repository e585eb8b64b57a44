"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake in what the user gave: one line that says what was wrong and what is allowed.

    Command-line programs print the line and exit with status 2, without a traceback.
    """
