"""A user's mistakes at the edge of a command: one line each on stderr, and exit status 2."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from clipmapper.errors import UserError, UserErrors, visible
from clipmapper.host.outputs import NO_ROOM
from clipmapper.host.progress import print_on_own_line
from clipmapper.settings.keys import SEED_LIMIT

_LONGEST = 480


def fail(*messages: str) -> NoReturn:
    """Print a line for each message and end the command. Of a line that nobody would read to its end, which
    quotes a name or a value of thousands of letters, the middle is left out."""
    for message in messages:
        line = " ".join(visible(message).split())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        print_on_own_line(f"error: {line}", ends=True)
    sys.exit(2)


@contextmanager
def mistakes_end_it() -> Iterator[None]:
    """A ``UserError`` ends the command, and so does what the file system says of a path (a name that is too
    long, a folder without permission, a file that went away), which is never the code's mistake."""
    try:
        yield
    except UserErrors as error:
        fail(*error.lines)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None or error.errno in NO_ROOM:
            raise
        fail(f"{error.filename}: {error.strerror or error}")


class Arguments(ArgumentParser):
    """argparse's parser, whose complaint is one line and not preceded by many lines of usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help says what is allowed")


def whole(minimum: int = 1, maximum: int | None = None) -> Callable[[str], int]:
    """For ``type=``: a whole number within these limits, which are allowed themselves."""
    allowed = f"a whole number of at least {minimum}" if maximum is None else f"{minimum} to {maximum}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < minimum or (maximum is not None and number > maximum):
            raise ArgumentTypeError(f"{text!r} is not {allowed}")
        return number

    return read


seed = whole(0, SEED_LIMIT)


def seconds(text: str) -> float:
    """For ``type=``: a time, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


def some_path(text: str) -> Path:
    """For ``type=``: a path; an empty one, an unset variable of the shell's, would be the folder that one is
    in."""
    if not text.strip() or "\0" in text:
        raise ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)
