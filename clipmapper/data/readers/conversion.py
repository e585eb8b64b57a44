"""Public data sets in their official files, turned into a manifest
(:mod:`clipmapper.data.readers.manifest`)."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from clipmapper.data.images import JPEG, PNG, image_problem
from clipmapper.data.readers.fields import ANSWERS, FLAG, KEY, NUMBER, TEXT, TEXTS, shown
from clipmapper.data.readers.fine_tuning_sets import clevr, path_vqa, slake, snli_ve, vqa_rad
from clipmapper.data.readers.manifest import captioned_images, check_image, leads_out
from clipmapper.data.readers.source import Row, Source
from clipmapper.data.records import OTHER
from clipmapper.data.text_files import is_text, read_json
from clipmapper.errors import UserError
from clipmapper.host.outputs import file_name_problem, write_whole


def convert(name: str, source: Source, split: str, output: Path) -> tuple[int, int]:
    """Write the manifest; returns how many lines and images it has.

    ``name``: a key of :data:`READERS`. Paths of images are relative to the manifest. Images that have no
    files are written into ``source.images``, masks into a folder beside the manifest. Raises ``UserError``
    for files that are not what they should be, and ``UserErrors`` with every entry that is wrong, a question
    without answers outside the split test among them; nothing is left then. ``source`` knows what was
    converted.
    """
    if name not in READERS:
        raise UserError(f"{name!r} is not one of {', '.join(READERS)}")
    for option, owner, instead in _OPTIONS:
        if getattr(source, option) is not None and name != owner:
            raise UserError(f"--{option} {getattr(source, option)}: {name} {instead}")
    if source.more and name not in _IN_PARTS:
        raise UserError(f"{source.more[0]}: {name} is read from one file")
    beside = _Beside()
    try:
        lines, images = _lines(name, source, split, output, beside)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "\n".join(lines) + "\n")
    except BaseException:
        beside.undo()
        raise
    return len(lines), images


def _lines(name: str, source: Source, split: str, output: Path, beside: "_Beside") -> tuple[list[str], int]:
    lines, images, first = [], set(), {}
    reading = source.reading
    for row in READERS[name](source):
        where = row.pop("source")
        if row.pop("split", split) != split:
            source.told["entries left out, of another split"] += 1
            continue
        if "id" in row and first.setdefault(row["id"], where) != where:
            reading.wrong(where, "the same id twice", f"{row['id']!r} is that of {first[row['id']]} too")
        answered = row.get("answers") or row.get("captions")
        if split != "test" and not answered:
            what = f"{row['id']}; --split test takes such files"
            reading.wrong(where, "no answers or captions", what)
        if split == "test" and row.get("captions") == []:
            raise UserError(f"{source.questions}: images without captions can't be learnt from or scored")
        image = row["image"]
        if isinstance(image, bytes):
            content, image = image, _named(source.images, image)
            if image not in images and (problem := image_problem(content)) is not None:
                reading.wrong(where, *problem)
                continue
            beside.write(image, content)
        images.add(image)
        if leads_out(os.path.relpath(image, source.images)):
            reading.wrong(where, "an image outside the folder of images", str(image))
        row["image"] = os.path.relpath(image, output.parent)
        if row.get("mask") is not None:
            mask = _named(output.with_name(f"{output.stem}_masks"), row["mask"])
            beside.write(mask, row["mask"])
            row["mask"] = os.path.relpath(mask, output.parent)
        kept = {key: value for key, value in row.items() if value is not None}
        line = json.dumps(kept | {"split": split}, ensure_ascii=False)
        if not is_text(line):
            reading.wrong(where, "not text", "half of a surrogate pair in it")
        lines.append(line)
    reading.stop()
    if not lines:
        left = "; ".join(f"{count} {what}" for what, count in source.told.items())
        raise UserError(f"{source.questions}: nothing in it" + f" for --split {split} ({left})" * bool(left))
    return lines, len(images)


def _named(folder: Path, content: bytes) -> Path:
    """Name a file by what is in it: what a name stands for is never replaced by something else."""
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), "")
    return folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{suffix}"


_SUFFIXES = {JPEG: ".jpg", PNG: ".png"}


class _Beside:
    """The files that are written while entries are read, for there may be more of them than fit in memory."""

    def __init__(self) -> None:
        self.made: list[Path] = []  # folders and files, in this order

    def write(self, path: Path, content: bytes) -> None:
        if path.is_file() and path.stat().st_size == len(content):
            return
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self.made.append(folder)
        self.made.append(path)
        path.write_bytes(content)

    def undo(self) -> None:
        for path in reversed(self.made):
            try:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            except OSError:  # somebody else has written to the folder meanwhile
                continue


_DIRECT = TEXTS.or_else(None)
_GQA = {"imageId": KEY, "question": TEXT, "answer": TEXT.or_else(None)}
_GQA_TYPES = {"structural": TEXT.or_else(OTHER)}


def _gqa(source: Source) -> Iterator[Row]:
    """GQA (Hudson and Manning 2019, arXiv 1902.09506): a dictionary by question id; one answer."""
    content = read_json(source.questions, "GQA's questions")
    if not isinstance(content, Mapping):
        raise UserError(f"{source.questions}: GQA's questions are a dictionary by question id")
    for number, found in content.items():
        where = f"{source.questions}: question {number}"
        entry = source.reading.entry(where, found, _GQA)
        if entry is None:
            continue
        types = found.get("types")
        kinds = types if isinstance(types, Mapping) else {"structural": types}
        kind = source.reading.entry(f"{where}, 'types'", kinds, _GQA_TYPES)
        if kind is None:
            continue
        yield {
            "source": where,
            "id": number,
            "image": source.images / f"{entry['imageId']}.jpg",
            "question": entry["question"],
            "family": kind["structural"],
            "answers": None if entry["answer"] is None else [entry["answer"]],
        }


_OK_VQA = {"question_id": NUMBER, "image_id": NUMBER.or_else(None), "answers": ANSWERS, "question_type": TEXT}
_ASKED = {"question_id": NUMBER, "image_id": NUMBER, "question": TEXT}


def _ok_vqa(source: Source) -> Iterator[Row]:
    """OK-VQA (Marino et al. 2019, arXiv 1906.00067): files as VQA v2's. Of an answer both what was typed
    (``raw_answer``) and its processed form are there; the official accuracy is of the latter."""
    file, reading = source.annotations, source.reading
    if file is None:
        raise UserError("OK-VQA has its answers in a file of their own; give it as --annotations")
    annotated = read_json(file, "OK-VQA's annotations")
    answers: dict[int, dict] = {}
    for entry in reading.listed(annotated, "annotations", file, _OK_VQA):
        if answers.setdefault(entry["question_id"], entry) is not entry:
            reading.wrong(entry["source"], "the same question annotated twice", str(entry["question_id"]))
    complete = not reading.problems  # else annotations that are wrong would be told twice
    topics = annotated.get("question_types") or {}
    if not isinstance(topics, Mapping) or not all(isinstance(topic, str) for topic in topics.values()):
        raise UserError(f"{file}: 'question_types' is not a dictionary of texts but {shown(topics)}")
    content = read_json(source.questions, "OK-VQA's questions")
    subset = content.get("data_subtype", "val2014") if isinstance(content, Mapping) else ""
    if not isinstance(subset, str) or file_name_problem(subset):
        raise UserError(f"{source.questions}: 'data_subtype' is not the name of a split but {shown(subset)}")
    for entry in reading.listed(content, "questions", source.questions, _ASKED):
        number = entry["question_id"]
        if number not in answers:
            if complete:
                what = f"a question of {source.questions.name} is not annotated"
                reading.wrong(str(file), what, str(number))
            continue
        check_image(entry, answers[number]["image_id"], reading)
        kind = answers[number]["question_type"]
        yield {
            "source": entry["source"],
            "id": number,
            "image": source.images / f"COCO_{subset}_{entry['image_id']:012d}.jpg",
            "question": entry["question"],
            "answers": answers[number]["answers"],
            "family": topics.get(kind) or kind,
        }


_A_OKVQA = {"question_id": KEY, "image_id": NUMBER, "question": TEXT, "direct_answers": _DIRECT}


def _a_okvqa(source: Source) -> Iterator[Row]:
    """A-OKVQA (Schwenk et al. 2022, arXiv 2206.01718), direct answers; ``data.accuracy=a_okvqa`` scores them
    as its own code does. Images are those of COCO 2017."""
    schema = _A_OKVQA | {"difficult_direct_answer": FLAG.or_else(False)}
    for entry in source.listed(None, "A-OKVQA's questions", schema):
        yield {
            "source": entry["source"],
            "id": entry["question_id"],
            "image": source.images / f"{entry['image_id']:012d}.jpg",
            "question": entry["question"],
            "family": "difficult" if entry["difficult_direct_answer"] else "direct",
            "answers": entry["direct_answers"],
        }


_VIZWIZ = {
    "image": TEXT, "question": TEXT, "answers": ANSWERS.or_else(None), "answer_type": TEXT.or_else(OTHER)
}  # fmt: skip


def _vizwiz(source: Source) -> Iterator[Row]:
    """VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218). Its answers have no ``answer_id``: a manifest tells
    annotators apart by place, so that the official accuracy counts them all."""
    for entry in source.listed(None, "VizWiz's annotations", _VIZWIZ):
        yield {
            "source": entry["source"],
            "id": entry["image"],  # one question an image
            "image": source.images / entry["image"],
            "question": entry["question"],
            "family": entry["answer_type"],
            "answers": entry["answers"],
        }


_TEXTVQA = {"question_id": NUMBER, "image_id": KEY, "question": TEXT, "answers": _DIRECT}


def _textvqa(source: Source) -> Iterator[Row]:
    """TextVQA (Singh et al. 2019, arXiv 1904.08920), ``TextVQA_0.5.1_*.json``: answers are plain strings."""
    for entry in source.listed("data", "TextVQA's questions", _TEXTVQA):
        yield {
            "source": entry["source"],
            "id": entry["question_id"],
            "image": source.images / f"{entry['image_id']}.jpg",
            "question": entry["question"],
            "answers": entry["answers"],
        }


def _nocaps(source: Source) -> Iterator[Row]:
    """nocaps (Agrawal et al. 2019, arXiv 1812.08658): as COCO's captions, each image with a ``domain``."""
    return _captions(source, "nocaps' captions")


def _coco_captions(source: Source) -> Iterator[Row]:
    """COCO's captions, without the Karpathy split (``data=coco_captions`` knows it)."""
    return ({k: v for k, v in row.items() if k != "family"} for row in _captions(source, "COCO's captions"))


def _captions(source: Source, what: str) -> Iterator[Row]:
    found = captioned_images(source.questions, what, source.reading)
    source.reading.stop()  # before a caption that is wrong is told as one that is not there
    for image, said in found:
        yield {
            "source": image["source"],
            "id": image["id"],
            "image": source.images / image["file_name"],
            "captions": said,
            "family": image["domain"],
        }


_EASY_VQA = {"question": TEXT, "answer": TEXT, "image id": KEY}


def _easy_vqa(source: Source) -> Iterator[Row]:
    """easy-VQA (github.com/vzhou842/easy-VQA): ``[question, answer, image id]``."""
    content = read_json(source.questions, "easy-VQA's questions")
    if not isinstance(content, list):
        raise UserError(f"{source.questions}: easy-VQA's questions are a list")
    for number, found in enumerate(content, 1):
        where = f"{source.questions}: entry {number}"
        if not isinstance(found, list) or len(found) != 3:
            source.reading.wrong(where, "not [question, answer, image id]", shown(found))
            continue
        named = dict(zip(_EASY_VQA, found, strict=True))
        if (entry := source.reading.entry(where, named, _EASY_VQA)) is None:
            continue
        answer = entry["answer"]
        yield {  # without an id: it has none, and numbers would come again in the other split
            "source": where,
            "image": source.images / f"{entry['image id']}.png",
            "question": entry["question"],
            "answers": [answer],
            "family": "yes/no" if answer in ("yes", "no") else OTHER,
        }


# Options that one data set alone has, and what is said of the others.
_OPTIONS = (
    ("annotations", "ok_vqa", "has its answers in the first file"),
    ("masks", "clevr", "has no masks"),
    ("language", "slake", "is in one language"),
)
_IN_PARTS = WITH_IMAGES = ("path_vqa",)  # in several files; with the images in them

# The official formats, by the name of the data set.
READERS: Mapping[str, Callable[[Source], Iterator[Row]]] = {
    "gqa": _gqa,
    "ok_vqa": _ok_vqa,
    "a_okvqa": _a_okvqa,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "nocaps": _nocaps,
    "coco_captions": _coco_captions,
    "easy_vqa": _easy_vqa,
    "clevr": clevr,
    "snli_ve": snli_ve,
    "vqa_rad": vqa_rad,
    "slake": slake,
    "path_vqa": path_vqa,
}
