"""``shards.json``, which ``scripts/make_shards.py`` writes last, checked before any of it is believed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmapper.data.answers import ACCURACIES, RULES
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
        return _checked(json.loads(file.read_bytes().decode("utf-8-sig")))
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
