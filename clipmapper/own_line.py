"""Lines on stderr that begin where a line begins, whatever progress bars have written before."""

import sys

from tqdm import tqdm


def print_on_own_line(text: str, *, ends: bool = False) -> None:
    """``ends``: nothing goes on behind it: bars, which leave the cursor at their end, are closed.

    Otherwise they are taken away for the line and drawn again below it.
    """
    sys.stdout.flush()
    if ends:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)
