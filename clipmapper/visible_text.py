"""Text of files and of other people, made safe to print."""

import re

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
