"""Find each sample in a tar file by one pass over its headers, and remember where it is beside the file."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock

from clipmapper.data.answers import counted_answers
from clipmapper.data.record import Problem
from clipmapper.data.records import Record
from clipmapper.data.shards.samples import (
    LONGEST_NAME,
    Damage,
    NoSample,
    Sample,
    ShardImage,
    add_member,
    as_problem,
    check_sample,
    members,
    open_shard,
    read_part,
    sample_name,
    told_about,
)
from clipmapper.errors import UserError
from clipmapper.host.outputs import whole_file
from clipmapper.host.progress import progress

_VERSION = 1
_FOLDER = ".clipmapper"  # beside the shards
_PLACES = ("image", "image_size", "json", "json_size", "text", "text_size", "records")


@dataclass(frozen=True)
class Drawn:
    """Which samples of a shard are in a split, where none is given: each by a draw of its own."""

    validation: bool
    share: float
    seed: int

    def of(self, shard: str, count: int) -> np.ndarray:
        held = places(shard, count, self.seed) < self.share
        return np.flatnonzero(held if self.validation else ~held)


def places(shard: str, count: int, seed: int) -> np.ndarray:
    """Uniform in [0, 1) for each sample of a shard, by its name."""
    digest = hashlib.blake2b(f"{seed}/{shard}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(count)


@dataclass(frozen=True)
class ScannedShard:
    """A tar file whose samples are known. ``index``: the file that holds their places, as the shard was
    at ``stamp``. ``ids``: what is put before a sample's key to make it the only one of its name."""

    path: Path
    index: Path
    images: int
    records: int
    captioned: bool | None
    stamp: tuple[int, ...]
    drawn: Drawn | None = None
    ids: str = ""

    @property
    def samples(self) -> np.ndarray:
        """Places, sizes and names of the samples of this split, in the order of the tar file."""
        return _samples(self)

    def part(self, drawn: Drawn) -> "ScannedShard":
        """The samples that ``drawn`` draws."""
        chosen = _samples(replace(self, drawn=drawn))
        return replace(self, images=len(chosen), records=int(chosen["records"].sum()), drawn=drawn)

    def record(self, number: int) -> Record:
        """Record ``number`` of the shard: its text is read now, its image when it is asked for."""
        row = int(np.searchsorted(_ends(self), number, side="right"))
        first = int(_ends(self)[row]) - int(self.samples[row]["records"])
        return self._records(self.samples[row])[number - first]

    def every_record(self) -> list[Record]:
        """All of them, in order."""
        return [record for sample in self.samples for record in self._records(sample)]

    def counted(self) -> list[list[str]]:
        """The answers by which each question counts for the vocabulary (:func:`counted_answers`)."""
        counted = self._told()["counted"]
        if not counted:
            return []
        rows = range(len(counted)) if self.drawn is None else self.drawn.of(self.path.name, len(counted))
        return [counted[row] for row in rows]

    def words(self) -> list[str]:
        """Each word of the captions of the whole shard once."""
        return self._told()["words"]

    def problems(self) -> list[Problem]:
        """The members of the shard that are no samples."""
        return [Problem(*problem) for problem in self._told()["problems"]]

    def keys(self) -> np.ndarray:
        return np.array([sample_name(name.decode())[0] for name in self.samples["name"]])

    def _told(self) -> dict:
        return _load(self.index, self.stamp)[1]

    def _records(self, sample: np.void) -> list[Record]:
        told = (
            None
            if sample["json"] < 0
            else read_part(self.path, int(sample["json"]), int(sample["json_size"]))
        )
        text = (
            None
            if sample["text"] < 0
            else read_part(self.path, int(sample["text"]), int(sample["text_size"]))
        )
        image = ShardImage(self.path, int(sample["image"]), int(sample["image_size"]))
        name = sample["name"].decode()
        try:
            # Whether answers are needed was checked when it was scanned.
            found = told_about(image, sample_name(name)[0], self.path, told, text, answered=False)
            if len(found) != sample["records"]:
                raise NoSample("another number of records")
        except NoSample as mistake:
            raise UserError(
                f"{self.path}: {name} has changed since the run began ({mistake.args[0]})"
            ) from mistake
        key, file, own = sample_name(name)[0], f"{self.path.name}/{name}", f"{self.path}: {name}"
        found = [replace(r, source=own, id=self._id(r.id, key)) for r in found]
        # Of others' records the image has no name but its place; make_shards.py has kept the name.
        return [r if r.image_id != str(image) else replace(r, image_id=file) for r in found]

    def _id(self, given: int | str, key: str) -> int | str:
        """Put the shard's name before an id that is the sample's key and not the only one of its name."""
        of_key = str(given) == key or str(given).startswith(f"{key}/")
        return f"{self.ids}{given}" if self.ids and of_key else given


def scanned(paths: Sequence[Path], *, answered: bool = True) -> list[ScannedShard]:
    """The shards of a split, each read through once; what was found is remembered beside it, or, where
    nothing may be written there, among the user's own files, for as long as the shard has its size and time.

    ``answered``: whether questions need answers. Says how far it is; interrupted, the next call goes on. Of
    several processes one reads, the others wait. Raises ``UserError`` for what is in no honest shard.
    """
    folders = {path.parent: _place_for(path.parent) for path in paths}
    stale = [path for path in paths if _remembered(path, folders[path.parent], answered) is None]
    if stale:
        with progress("reading what is in the shards", len(stale)) as advance:
            for path in stale:
                place = folders[path.parent]
                with FileLock(place / "scan.lock"):
                    if _remembered(path, place, answered) is None:
                        _scan(path, place, answered)
                advance(1)
    found = [_remembered(path, folders[path.parent], answered) for path in paths]
    assert all(shard is not None for shard in found)
    return found


def _place_for(folder: Path) -> Path:
    """Where the indices of a folder's shards are kept."""
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    own = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        / "clipmapper"
        / "shards"
        / name
    )
    for place in (folder / _FOLDER, own, Path(tempfile.gettempdir()) / f"clipmapper-{os.getuid()}" / name):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(place, os.W_OK):
                return place
    raise UserError(f"{folder}: nothing can be written there, nor in ~/.cache or {tempfile.gettempdir()}")


def _stamp(path: Path, answered: bool) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return [_VERSION, found.st_size, found.st_mtime_ns, int(answered)]


def _remembered(path: Path, place: Path, answered: bool) -> ScannedShard | None:
    index = place / f"{path.name}.npz"
    try:
        samples, told, stamp = _read(index)
        right = stamp == _stamp(path, answered) and _in_place(samples, stamp[1])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        RecursionError,
    ):
        return None  # absent, damaged or something else
    if not right:
        return None
    return ScannedShard(
        path, index, len(samples), int(samples["records"].sum()), told["captioned"], tuple(stamp)
    )


def _in_place(samples: np.ndarray, size: int) -> bool:
    """Whether all that an index names is inside the shard, and no name would do something to a terminal."""
    there = samples["image"] >= 0
    for name in ("image", "json", "text"):
        start, length = samples[name], samples[f"{name}_size"]
        there &= (start < 0) | ((length >= 0) & (length <= size) & (start <= size - length))
    there &= (samples["records"] > 0) & (samples["records"] < 2**31)
    letters = np.frombuffer(samples["name"].tobytes(), np.uint8)
    return bool(there.all() and not ((letters > 0) & (letters < 32) | (letters == 127)).any())


def _read(index: Path) -> tuple[np.ndarray, dict, list[int]]:
    with np.load(index, allow_pickle=False) as file:
        samples = np.zeros(len(file["name"]), _type(file["name"].dtype.itemsize))
        for place, column in zip(_PLACES, file["places"].T, strict=True):
            samples[place] = column
        samples["name"] = file["name"]
        told = json.loads(file["told"].tobytes())
        for name in ("problems", "counted", "words"):
            if not isinstance(told[name], list):
                raise ValueError(name)
        return samples, told, file["stamp"].tolist()


# Keyed by the stamp as well: a shard may be written anew under its name.


@lru_cache(maxsize=64)
def _load(index: Path, stamp: tuple[int, ...]) -> tuple[np.ndarray, dict]:
    try:
        samples, told, found = _read(index)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{index}: gone or damaged since the run began; start it again") from error
    if tuple(found) != stamp:
        raise UserError(f"{index}: the shard has changed since the run began; start it again")
    return samples, told


@lru_cache(maxsize=64)
def _samples(shard: "ScannedShard") -> np.ndarray:
    samples = _load(shard.index, shard.stamp)[0]
    return samples if shard.drawn is None else samples[shard.drawn.of(shard.path.name, len(samples))]


@lru_cache(maxsize=64)
def _ends(shard: "ScannedShard") -> np.ndarray:
    return np.cumsum(_samples(shard)["records"])


def _type(name_bytes: int) -> np.dtype:
    return np.dtype([*((place, np.int64) for place in _PLACES), ("name", f"S{max(name_bytes, 1)}")])


def _scan(path: Path, place: Path, answered: bool) -> None:
    stamp = _stamp(path, answered)
    samples: dict[str, Sample] = {}
    problems: list[Problem] = []
    with open_shard(path) as file:
        try:
            for member in members(file):
                add_member(
                    samples,
                    member,
                    lambda *mistake: problems.append(as_problem(path, mistake[0], mistake[1:])),
                )
        except Damage as damage:
            # What was being written when it was cut has an image but no text, or the other way round.
            problems.append(Problem(str(path), *damage.args))
        rows, names, words, counted, kinds = [], [], set(), [], set()
        for sample in samples.values():
            name = (sample.images or [sample.json or sample.text])[0]
            shown = sample.key if name is None else name.name
            try:
                check_sample(sample)
                found = _told(path, sample, answered)
            except NoSample as mistake:
                problems.append(as_problem(path, shown, mistake.args))
                continue
            rows.append(_places(sample, len(found)))
            names.append(sample.images[0].name.encode())
            kinds.update(bool(record.captions) for record in found)
            words.update(word for record in found for caption in record.captions for word in caption.split())
            counted.append([a for record in found if record.answers for a in counted_answers(record.answers)])
    if len(kinds) > 1:
        raise UserError(f"{path}: questions and captions in one data set")
    told = {
        "problems": [[p.source, p.kind, p.detail] for p in problems],
        "captioned": kinds.pop() if kinds else None,
        "counted": counted if any(counted) else [],
        "words": sorted(words),
    }
    numbers = np.array(rows, np.int64).reshape(-1, len(_PLACES))
    assert all(len(name) <= 4 * LONGEST_NAME for name in names)
    content = np.frombuffer(json.dumps(told).encode(), np.uint8)
    index = place / f"{path.name}.npz"
    try:
        with whole_file(index, durable=False) as file:
            np.savez_compressed(
                file,
                places=numbers,
                name=np.array(names or [b""], "S")[: len(names)],
                told=content,
                stamp=np.array(stamp),
            )
    except OSError as error:
        raise UserError(f"{index}: cannot be written ({error.strerror})") from error


def _told(path: Path, sample: Sample, answered: bool) -> list[Record]:
    image = sample.images[0]
    told, text = (
        None if member is None else read_part(path, member.offset, member.size)
        for member in (sample.json, sample.text)
    )
    return told_about(ShardImage(path, image.offset, image.size), sample.key, path, told, text, answered)


def _places(sample: Sample, records: int) -> list[int]:
    row: list[int] = []
    for member in (sample.images[0], sample.json, sample.text):
        row += [-1, 0] if member is None else [member.offset, member.size]
    return [*row, records]
