"""Names of pictures, from texts of any script."""

import hashlib
import unicodedata

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
