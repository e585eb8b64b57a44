"""The samples of a tar file: an image and what was asked or said about it, under one key."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipmapper.data.problems import Problem
from clipmapper.data.readers.rows import RowReader
from clipmapper.data.records import Record
from clipmapper.data.shards.members import Member, ShardImage
from clipmapper.data.text_files import parsed_json

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
_LONGEST_TEXT = 2**24  # bytes
# What scripts/make_shards.py writes of a record.
KEPT = ("id", "image_id", "question", "answers", "family", "captions")
# What is taken of others' JSON; all else that is there (url, sha256, status) is passed over.
_TAKEN = (
    "id",
    "question_id",
    "question",
    "answers",
    "answer",
    "captions",
    "caption",
    "family",
    "answer_type",
)


class NoSample(Exception):
    """(kind of problem, detail)"""


@dataclass
class Sample:
    """Files of one key. ``json``, ``text``: None where there is none."""

    key: str
    images: list[Member] = field(default_factory=list)
    json: Member | None = None
    text: Member | None = None
    others: list[str] = field(default_factory=list)


def sample_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a file's name, as webdataset divides it: at the first dot behind the last slash.

    The suffix is in lower case and what is behind its last dot. None for what belongs to no sample: hidden
    files, metadata (``__…__``), names without a suffix.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _dot, suffix = base.partition(".")
    if not stem or not suffix or (not folder and stem.startswith("__") and stem.endswith("__")):
        return None
    return f"{folder}{slash}{stem}", suffix.rpartition(".")[2].lower()


def add_member(samples: dict[str, Sample], member: Member, problems: Callable[[str, str], None]) -> None:
    """Put a file to its sample. ``problems`` is told of a file that is there twice."""
    named = sample_name(member.name)
    if named is None:
        return
    key, suffix = named
    sample = samples.setdefault(key, Sample(key))
    if suffix in IMAGE_SUFFIXES:
        if any(image.name == member.name for image in sample.images):
            problems(member.name, "the same file twice")
        else:
            sample.images.append(member)
    elif suffix in ("json", "txt"):
        place = "json" if suffix == "json" else "text"
        if getattr(sample, place) is not None:
            problems(member.name, "the same file twice")
        else:
            setattr(sample, place, member)
    else:
        sample.others.append(suffix)


def check_sample(sample: Sample) -> None:
    """Raises ``NoSample`` where it is not one image and what was said about it."""
    if len(sample.images) > 1:
        raise NoSample("several images of one key", ", ".join(image.name for image in sample.images))
    if not sample.images:
        there = ", ".join(
            [*(["json"] if sample.json else []), *(["txt"] if sample.text else []), *sample.others]
        )
        raise NoSample("no image", f"only {there}")
    if sample.json is None and sample.text is None:
        more = f"; {', '.join(sample.others)} is not read" if sample.others else ""
        raise NoSample("an image without text", f"give a .txt (a caption) or .json{more}")
    for member in (sample.json, sample.text):
        if member is not None and member.size > _LONGEST_TEXT:
            raise NoSample("too much text", f"{member.size} bytes in {member.name}")


def told_about(
    image: ShardImage, key: str, shard: Path, told: bytes | None, text: bytes | None, answered: bool
) -> list[Record]:
    """The records of an image, from the contents of its ``.json`` and ``.txt``.

    JSON of ``scripts/make_shards.py`` is a list of records, taken as it is. Others' is an object or a list of
    them with ``question`` and ``answers`` (``answer``), or ``captions`` (``caption``). A ``.txt`` is a
    caption, for an image about which no question and no list of captions is told. ``answered``: whether a
    question needs answers (those of a test split do not).

    Raises ``NoSample`` for what is none of that.
    """
    source = f"{shard}: {key}"
    rows = [] if told is None else _parsed(told)
    if rows and all(isinstance(row, dict) and set(row) == set(KEPT) for row in rows):
        return [_as_kept(row, image, source) for row in rows]
    if text is not None and not any(row.get("question") or row.get("captions") for row in rows):
        try:
            rows = [{**(rows[0] if len(rows) == 1 else {}), "captions": text.decode("utf-8-sig")}]
        except UnicodeDecodeError as error:
            raise NoSample("not UTF-8 text", f"byte {error.start + 1} of its .txt") from error
        rows[0].pop("caption", None)
    if not rows:
        raise NoSample("nothing told about the image", "its .json is an empty list")
    found = []
    for number, row in enumerate(rows):
        taken = {name: row[name] for name in _TAKEN if row.get(name) is not None}
        if taken.get("question") is not None:  # a caption beside a question is not what is asked
            taken.pop("caption", None)
            taken.pop("captions", None)
        if "answers" in taken:
            taken.pop("answer", None)
        if taken.get("id") is None and taken.get("question_id") is None:
            taken["id"] = key if len(rows) == 1 else f"{key}/{number}"
        reader = RowReader(Path())
        split_and_record = reader.read(source, taken | {"image": image}, None if answered else "test")
        for problem in reader.problems:
            raise NoSample(problem.kind, problem.detail)
        _, record = split_and_record
        found.append(record)
    return found


def _parsed(told: bytes) -> list[dict]:
    try:
        parsed = parsed_json(told.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NoSample("not UTF-8 text", f"byte {error.start + 1} of its .json") from error
    except RecursionError as error:
        raise NoSample("not JSON", "nested too deeply") from error
    except ValueError as error:
        raise NoSample("not JSON", str(error)) from error
    rows = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(row, dict) for row in rows):
        raise NoSample("not an object in JSON", ascii(parsed)[:60])
    return rows


def _as_kept(row: Mapping, image: ShardImage, source: str) -> Record:
    """A record as it was written, type for type: a Record holds what it is given."""
    texts = [row["image_id"], row["family"], *([] if row["question"] is None else [row["question"]])]
    lists = [row["answers"], row["captions"]]
    right = isinstance(row["id"], int | str) and not isinstance(row["id"], bool)
    right = right and all(isinstance(some, list) for some in lists)
    if not right or not all(isinstance(text, str) for text in [*texts, *lists[0], *lists[1]]):
        raise NoSample("not a record of scripts/make_shards.py", ascii(row)[:60])
    if (row["question"] is None) != bool(row["captions"]):
        raise NoSample("not a record of scripts/make_shards.py", "it has a question and captions, or neither")
    return Record(
        row["id"], image, row["image_id"], row["question"], tuple(row["answers"]), row["family"],
        tuple(row["captions"]), source,
    )  # fmt: skip


def as_problem(shard: Path, name: str, mistake: Iterable[str]) -> Problem:
    kind, detail = (*mistake, "")[:2]
    return Problem(f"{shard}: {name}", kind, detail)
