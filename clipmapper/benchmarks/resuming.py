"""Going on with a benchmark that was interrupted: what its file has already."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipmapper.errors import UserError


def earlier_rows(path: Path, now: Mapping, must_agree: Mapping[str, Sequence[str]]) -> list[dict]:
    """The rows of ``path``; none where there is no such file.

    ``must_agree``: section → its entries that must be what they are ``now``. Raises ``UserError`` where one
    is not, and for a file that is no result of a benchmark.
    """
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        rows = before["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("no rows")
        entries = [(s, key, before[s].get(key)) for s, keys in must_agree.items() for key in keys]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--resume: {path} is no result of this benchmark; remove it, or give another --name"
        ) from error
    for section, key, was in entries:
        if was != now[section][key]:
            raise UserError(
                f"--resume: {path} was measured with {key} {was}, now it is {now[section][key]}; make them "
                "the same, or give another --name"
            )
    return rows
