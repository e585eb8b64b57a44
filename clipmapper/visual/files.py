"""Figures to files and to arrays."""

import contextlib
import hashlib
import os
import unicodedata
import uuid
from pathlib import Path

from matplotlib.figure import Figure

from clipmapper.errors import UserError
from clipmapper.visual.layout import house_style

# No dates and versions inside: the same figure gives the same bytes.
_METADATA = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None, "Creator": None}}


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG (or PDF, for papers), by the path's suffix; folders are made as needed.

    The file appears whole or not at all: it is written under a temporary name and then renamed.
    Raises UserError for another suffix and where the path cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise UserError(f"cannot write a picture to '{path}': the name must end in .png or .pdf")
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # however long the name itself is
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(partial, format=suffix[1:], metadata=_METADATA[suffix])
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write a picture to '{path}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


_DIGITS = 8  # of the digest: of 10,000 texts two are alike once in a hundred times, if their letters are too


def readable_part(text: str, longest: int, parted: str = "-") -> str:
    """Letters and digits of every script, in lower case, ``parted`` by what is none.

    At most ``longest`` bytes in UTF-8, the measure of file systems; it may be empty, and different texts may
    have the same.
    """
    kept = "".join(
        c if unicodedata.category(c)[0] in "LMN" else " "
        for c in unicodedata.normalize("NFC", text.lower())
        if c.isprintable() or c.isspace()
    )
    cut = parted.join(kept.split()).encode("utf-8", "ignore")[:longest].decode("utf-8", "ignore")
    return cut.strip(parted)


def picture_name(*texts: str, apart: str = "") -> str:
    """A name without an ending: the texts, and a digest of what they are exactly.

    By the digest different texts have different names on any file system, such as one without capitals.

    ``apart``: what else two pictures may differ in, for the digest alone.
    """
    exact = "\0".join([*texts, apart]).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(exact, digest_size=_DIGITS // 2).hexdigest()
    parts = [part for text in texts if (part := readable_part(text, 120 // len(texts)))]
    return "_".join(parts or ["image"]) + f"-{digest}"
