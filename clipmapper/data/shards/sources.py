"""Which tar files ``data.path`` stands for, and which split each of them is of."""

import re
from collections.abc import Sequence
from pathlib import Path

from clipmapper.data.shards.files import webdataset
from clipmapper.errors import UserError

_SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_NAMED = re.compile(
    rf"(?:^|[-_.])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?=[-_.\d])", re.IGNORECASE
)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:(//|[^\\/]*\s)|pipe:|file:", re.IGNORECASE)
_MOST = 1_000_000  # files


def local(setting: str, path: str) -> str:
    """``path``. Raises ``UserError`` for an address or a command: shards are files of this machine."""
    if _ADDRESS.match(path) or "\0" in path:
        raise UserError(
            f"{setting}={ascii(path)[1:-1]}: shards are files of this machine; give a folder, a tar file or "
            "several (name-{000..123}.tar); download what is elsewhere"
        )
    return path


def tar_files(setting: str, path: str) -> list[Path]:
    """The tar files of a folder, one tar file, or those of a pattern in braces, in the order of their names.

    Raises ``UserError`` where there are none, and for those of a pattern that are not there.
    """
    whole = Path(local(setting, path))
    if whole.is_dir():
        found = sorted(file for file in whole.iterdir() if file.name.endswith(".tar"))
        if not found:
            packed = sorted(
                file.name for file in whole.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", file.name)
            )
            more = f"; {packed[0]} is compressed: unpack that (gunzip)" if packed else ""
            raise UserError(f"{setting}={path}: no tar files in this folder{more}")
        return found
    names = [path]
    if "{" in path:
        try:
            names = []
            for name in webdataset(".shardlists").braceexpand.braceexpand(path):
                names.append(name)
                if len(names) > _MOST:
                    raise UserError(f"{setting}={path}: more than {_MOST:,} files")
        except ValueError as error:  # braceexpand's own is one
            raise UserError(f"{setting}={path}: its braces are not closed") from error
    twice = len(names) - len(set(names))
    if twice:
        raise UserError(f"{setting}={path}: {twice} files are there twice")
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        what = (
            "no such file or folder"
            if names == [path]
            else f"{len(missing)} of {len(names)} files are not there"
        )
        raise UserError(
            f"{setting}={path}: {what}{'' if names == [path] else f'; the first is {missing[0]}'}"
        )
    return [Path(name) for name in names]


def named_splits(setting: str, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names begin with or hold (``imagenet-val-000001.tar``); all of them under
    "train" where no name says one. Raises ``UserError`` where some do and others do not."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        named = _NAMED.search(file.name)
        splits.setdefault(_SPLITS[named[1].lower()] if named else "", []).append(file)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        other = next(iter(splits.values()))[0]
        raise UserError(
            f"{setting}: {other.name} names a split, {unnamed[0].name} does not; name all of them or none"
        )
    if unnamed:
        return {"train": unnamed}
    if "train" not in splits:
        raise UserError(f"{setting}: its files are named {', '.join(splits)}, and none of them train")
    return splits
