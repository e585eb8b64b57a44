"""Which tar files are a data set: what ``data.path`` names, or a checked ``shards.json``."""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from clipmapper.data.answers import ACCURACIES, RULES
from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError

INDEX = "shards.json"
PLAN = "plan.json"  # written first
VERSION = 2
# A name of a file in the same folder, and nothing else.
_NAME = re.compile(r"\w[\w.+-]{0,200}\.tar")


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, how many images and how many records (questions, or images with captions)."""

    name: str
    images: int
    records: int


@dataclass(frozen=True)
class ShardIndex:
    """The content of ``shards.json``. ``answers``: None for captions. ``words``: of all captions."""

    splits: Mapping[str, Sequence[Shard]]
    answers: Sequence[str] | None
    rule: str | None
    accuracy: str
    families: Sequence[str]
    words: Sequence[str]


def read_index(folder: Path) -> ShardIndex | None:
    """The index of a folder; None where there is none, as of shards that others have written.

    Raises ``UserError`` for an index that is damaged or not one of ``scripts/make_shards.py``, and where that
    was interrupted before it wrote one.
    """
    file = folder / INDEX
    if not file.is_file():
        if (folder / PLAN).exists():
            raise UserError(
                f"data.path={folder}: no {INDEX}: scripts/make_shards.py was interrupted; the same command "
                "goes on from there"
            )
        return None
    try:
        return _checked(parsed_json(file.read_bytes().decode("utf-8-sig")))
    except (OSError, ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else problem
        raise UserError(
            f"data.path={folder}: no readable {INDEX} of scripts/make_shards.py ({reason})"
        ) from problem


def _checked(found: object) -> ShardIndex:
    """Raises ``ValueError``, with what is wrong."""
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    if found.get("version") != VERSION or isinstance(found["version"], bool):
        raise ValueError(
            f"it is of version {_shown(found.get('version'))}, not {VERSION}; make the shards anew"
        )
    missing = [
        name for name in ("splits", "answers", "rule", "accuracy", "families", "words") if name not in found
    ]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    splits = found["splits"]
    if not isinstance(splits, dict) or not {"train", "validation"} <= set(splits) <= {
        "train",
        "validation",
        "test",
    }:
        raise ValueError("splits: train and validation, and test where there is one")
    seen: set[str] = set()
    read = {
        split: [_shard(split, entry, seen) for entry in _list(split, some)] for split, some in splits.items()
    }
    empty = [split for split, shards in read.items() if not shards]
    if empty:
        raise ValueError(f"{empty[0]} has no shards")
    answers, rule = found["answers"], found["rule"]
    if answers is not None:
        answers = _texts("answers", answers)
        if len(set(answers)) != len(answers) or len(answers) < 2:
            raise ValueError("answers: two different ones at least, and none twice")
        if not isinstance(rule, str) or rule not in RULES:
            raise ValueError(f"rule: {_shown(rule)} is not one of {', '.join(RULES)}")
    if not isinstance(found["accuracy"], str) or found["accuracy"] not in ACCURACIES:
        raise ValueError(f"accuracy: {_shown(found['accuracy'])} is not one of {', '.join(ACCURACIES)}")
    texts = {name: _texts(name, found[name]) for name in ("families", "words")}
    return ShardIndex(read, answers, rule, found["accuracy"], **texts)


def _shard(split: str, entry: object, seen: set[str]) -> Shard:
    if not isinstance(entry, dict) or set(entry) != {"name", "images", "records"}:
        raise ValueError(f"{split}: a shard has a name, images and records, not {_shown(entry)}")
    name = entry["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{split}: {_shown(name)} is not the name of a tar file in this folder")
    if name in seen:
        raise ValueError(f"{name} is there twice")
    seen.add(name)
    for what in ("images", "records"):
        number = entry[what]
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**40:
            raise ValueError(f"{name}: {what} is {_shown(number)}, not a number of at least 1")
    if entry["records"] < entry["images"]:
        raise ValueError(f"{name}: {entry['images']} images, but {entry['records']} records about them")
    return Shard(name, entry["images"], entry["records"])


def _list(what: str, found: object) -> list:
    if not isinstance(found, list):
        raise ValueError(f"{what}: not a list")
    return found


def _texts(what: str, found: object) -> list[str]:
    for text in _list(what, found):
        if not isinstance(text, str):
            raise ValueError(f"{what}: {_shown(text)} is not text")
    return found


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def webdataset(part: str = "") -> ModuleType:
    """The library, or a module of it. Raises ``UserError`` where it is not installed."""
    try:
        return importlib.import_module(f"webdataset{part}")
    except ImportError as error:
        raise UserError('shards need the webdataset library: pip install "clipmapper[shards]"') from error


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
