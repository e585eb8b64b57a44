"""Images in base64, in the column for them and in the one for paths."""

import base64
import binascii
import re

_LONGEST_NAME = 255  # bytes, of a file
# JPEG, PNG, GIF and WebP files begin so.
_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")


def looks_like_base64(text: str) -> bool:
    """Whether what stands for a path is an image's bytes."""
    text = _unquoted(text)
    if text.lower().startswith("data:"):
        return True
    # A path may begin as a JPEG does, or be long, but its names have an end.
    if len(text) < 60 or not re.fullmatch(r"[A-Za-z0-9+/_=\r\n-]+", text):
        return False
    return text.startswith(_STARTS) or max(map(len, text.split("/"))) > _LONGEST_NAME or len(text) > 4096


def decoded_base64(text: str) -> bytes:
    """The bytes; a ``data:`` address, lines and the alphabet of addresses (- and _) are read too.

    Raises ``ValueError``, with a reason, for what is no base64.
    """
    text = _unquoted(text)
    if text.lower().startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("a data: address that is not in base64")
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    if not text:
        raise ValueError("there is nothing in it")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _unquoted(text: str) -> str:
    """Without the marks of Python's bytes: a table has them where b64encode's result was written as it is."""
    text = text.strip()
    return text[2:-1] if re.fullmatch(r"b(['\"]).*\1", text, re.DOTALL) else text
