"""Public data sets in their official files, turned into a manifest
(:mod:`clipmapper.data.readers.manifest`)."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipmapper.data.readers.fields import ANSWERS, FLAG, KEY, NUMBER, TEXT, TEXTS, Entries, shown
from clipmapper.data.readers.manifest import captioned_images, check_image, leads_out
from clipmapper.data.records import OTHER
from clipmapper.data.text_files import is_text, read_json
from clipmapper.errors import UserError
from clipmapper.host.outputs import file_name_problem, write_whole


@dataclass(frozen=True)
class Source:
    """The official files of one split. ``annotations``: where answers have a file of their own. ``reading``
    takes note of what is wrong in them and of what was converted."""

    questions: Path
    annotations: Path | None
    images: Path
    reading: Entries = field(default_factory=Entries)

    def listed(self, key: str | None, what: str, schema: Mapping) -> Iterator[dict]:
        """The good entries of ``questions``."""
        return self.reading.listed(read_json(self.questions, what), key, self.questions, schema)


Row = dict[str, object]  # as a line of a manifest, ``image`` a path


def convert(name: str, source: Source, split: str, output: Path) -> tuple[int, int]:
    """Write the manifest; returns how many lines and images it has.

    ``name``: a key of :data:`READERS`. Paths of images are relative to the manifest. Raises ``UserError`` for
    files that are not what they should be, and ``UserErrors`` with every entry that is wrong, a question
    without answers outside the split test among them. ``source.reading`` knows what was converted.
    """
    if name not in READERS:
        raise UserError(f"{name!r} is not one of {', '.join(READERS)}")
    if source.annotations is not None and name not in _ANNOTATED:
        raise UserError(f"--annotations {source.annotations}: {name} has its answers in the first file")
    lines, images, first = [], set(), {}
    reading = source.reading
    for row in READERS[name](source):
        where = row.pop("source")
        if "id" in row and first.setdefault(row["id"], where) != where:
            reading.wrong(where, "the same id twice", f"{row['id']!r} is that of {first[row['id']]} too")
        answered = row.get("answers") or row.get("captions")
        if split != "test" and not answered:
            what = f"{row['id']}; --split test takes such files"
            reading.wrong(where, "no answers or captions", what)
        if split == "test" and row.get("captions") == []:
            raise UserError(f"{source.questions}: images without captions can't be learnt from or scored")
        images.add(row["image"])
        if leads_out(os.path.relpath(row["image"], source.images)):
            reading.wrong(where, "an image outside the folder of images", str(row["image"]))
        relative = os.path.relpath(row["image"], output.parent)
        kept = {key: value for key, value in row.items() if value is not None}
        line = json.dumps(kept | {"image": relative, "split": split}, ensure_ascii=False)
        if not is_text(line):
            reading.wrong(where, "not text", "half of a surrogate pair in it")
        lines.append(line)
    reading.stop()
    if not lines:
        raise UserError(f"{source.questions}: nothing in it")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "\n".join(lines) + "\n")
    return len(lines), len(images)


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


_ANNOTATED = ("ok_vqa",)  # with answers in a file of their own

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
}
