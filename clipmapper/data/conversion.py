"""Public data sets in their official files, turned into a manifest (:mod:`clipmapper.data.manifest`)."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmapper.data.official_files import entries, read_json
from clipmapper.data.records import OTHER
from clipmapper.errors import UserError
from clipmapper.outputs import write_whole


@dataclass(frozen=True)
class Source:
    """The official files of one split. ``annotations``: where answers have a file of their own."""

    questions: Path
    annotations: Path | None
    images: Path


Row = dict[str, object]  # as a line of a manifest, ``image`` a path


def convert(name: str, source: Source, split: str, output: Path) -> tuple[int, int]:
    """Write the manifest; returns how many lines and images it has.

    ``name``: a key of :data:`READERS`. Paths of images are relative to the manifest. Raises ``UserError`` for
    files that are not what they should be, and for a question without answers outside the split test.
    """
    if name not in READERS:
        raise UserError(f"{name!r} is not one of {', '.join(READERS)}")
    lines, images = [], set()
    for row in READERS[name](source):
        if split != "test" and not (row.get("answers") or row.get("captions")):
            raise UserError(
                f"{source.questions}: {row['id']} has no answers or captions; --split test takes such files"
            )
        if split == "test" and row.get("captions") is None and row.get("question") is None:
            raise UserError(f"{source.questions}: images without captions can't be learnt from or scored")
        images.add(row["image"])
        relative = os.path.relpath(row["image"], output.parent)
        lines.append(json.dumps(row | {"image": relative, "split": split}, ensure_ascii=False))
    if not lines:
        raise UserError(f"{source.questions}: nothing in it")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "\n".join(lines) + "\n")
    return len(lines), len(images)


def _gqa(source: Source) -> Iterator[Row]:
    """GQA (Hudson and Manning 2019, arXiv 1902.09506): a dictionary by question id; one answer."""
    content = read_json(source.questions, "GQA's questions")
    if not isinstance(content, Mapping):
        raise UserError(f"{source.questions}: GQA's questions are a dictionary by question id")
    for number, entry in content.items():
        _require(source.questions, f"question {number}", entry, ("imageId", "question"))
        answers = {"answers": [entry["answer"]]} if "answer" in entry else {}
        yield {
            "id": number,
            "image": source.images / f"{entry['imageId']}.jpg",
            "question": entry["question"],
            "family": entry.get("types", {}).get("structural") or OTHER,
            **answers,
        }


def _ok_vqa(source: Source) -> Iterator[Row]:
    """OK-VQA (Marino et al. 2019, arXiv 1906.00067): files as VQA v2's. Of an answer both what was typed
    (``raw_answer``) and its processed form are there; the official accuracy is of the latter."""
    if source.annotations is None:
        raise UserError("OK-VQA has its answers in a file of their own; give it as --annotations")
    annotated = read_json(source.annotations, "OK-VQA's annotations")
    keys = ("question_id", "answers", "question_type")
    answers = {e["question_id"]: e for e in entries(annotated, "annotations", source.annotations, keys)}
    topics = annotated.get("question_types", {})
    content = read_json(source.questions, "OK-VQA's questions")
    subset = content.get("data_subtype", "val2014") if isinstance(content, Mapping) else ""
    for entry in entries(content, "questions", source.questions, ("question_id", "image_id", "question")):
        number = entry["question_id"]
        if number not in answers:
            raise UserError(f"{source.annotations}: question {number} is not annotated")
        kind = answers[number]["question_type"]
        yield {
            "id": number,
            "image": source.images / f"COCO_{subset}_{entry['image_id']:012d}.jpg",
            "question": entry["question"],
            "answers": [answer["answer"] for answer in answers[number]["answers"]],
            "family": topics.get(kind) or kind,
        }


def _a_okvqa(source: Source) -> Iterator[Row]:
    """A-OKVQA (Schwenk et al. 2022, arXiv 2206.01718), direct answers; ``data.accuracy=a_okvqa`` scores them
    as its own code does. Images are those of COCO 2017."""
    for number, entry in enumerate(_listed(source.questions, "A-OKVQA's questions"), 1):
        where = f"entry {number}"
        _require(source.questions, where, entry, ("question_id", "image_id", "question"))
        answers = {"answers": list(entry["direct_answers"])} if entry.get("direct_answers") else {}
        yield {
            "id": entry["question_id"],
            "image": source.images / f"{entry['image_id']:012d}.jpg",
            "question": entry["question"],
            "family": "difficult" if entry.get("difficult_direct_answer") else "direct",
            **answers,
        }


def _vizwiz(source: Source) -> Iterator[Row]:
    """VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218). Its answers have no ``answer_id``: a manifest tells
    annotators apart by place, so that the official accuracy counts them all."""
    for number, entry in enumerate(_listed(source.questions, "VizWiz's annotations"), 1):
        _require(source.questions, f"entry {number}", entry, ("image", "question"))
        answers = {"answers": [a["answer"] for a in entry["answers"]]} if entry.get("answers") else {}
        yield {
            "id": entry["image"],  # one question an image
            "image": source.images / entry["image"],
            "question": entry["question"],
            "family": entry.get("answer_type") or OTHER,
            **answers,
        }


def _textvqa(source: Source) -> Iterator[Row]:
    """TextVQA (Singh et al. 2019, arXiv 1904.08920), ``TextVQA_0.5.1_*.json``: answers are plain strings."""
    content = read_json(source.questions, "TextVQA's questions")
    for entry in entries(content, "data", source.questions, ("question_id", "image_id", "question")):
        answers = {"answers": list(entry["answers"])} if entry.get("answers") else {}
        yield {
            "id": entry["question_id"],
            "image": source.images / f"{entry['image_id']}.jpg",
            "question": entry["question"],
            **answers,
        }


def _nocaps(source: Source) -> Iterator[Row]:
    """nocaps (Agrawal et al. 2019, arXiv 1812.08658): as COCO's captions, each image with a ``domain``."""
    for image, captions in _coco_like(source.questions, "nocaps' captions"):
        domain = {"family": image["domain"]} if image.get("domain") else {}
        yield {
            "id": image["id"],
            "image": source.images / image["file_name"],
            "captions": captions,
            **domain,
        }


def _coco_captions(source: Source) -> Iterator[Row]:
    """COCO's captions, without the Karpathy split (``data=coco_captions`` knows it)."""
    for image, captions in _coco_like(source.questions, "COCO's captions"):
        yield {"id": image["id"], "image": source.images / image["file_name"], "captions": captions}


def _easy_vqa(source: Source) -> Iterator[Row]:
    """easy-VQA (github.com/vzhou842/easy-VQA): ``[question, answer, image id]``."""
    for number, entry in enumerate(_listed(source.questions, "easy-VQA's questions"), 1):
        if not isinstance(entry, list) or len(entry) != 3:
            raise UserError(f"{source.questions}: entry {number} is not [question, answer, image id]")
        question, answer, image = entry
        yield {  # without an id: it has none, and numbers would come again in the other split
            "image": source.images / f"{image}.png",
            "question": question,
            "answers": [answer],
            "family": "yes/no" if answer in ("yes", "no") else OTHER,
        }


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


def _coco_like(path: Path, what: str) -> Iterator[tuple[Mapping, list[str]]]:
    """Every image's entry, with its captions."""
    content = read_json(path, what)
    images = {e["id"]: e for e in entries(content, "images", path, ("id", "file_name"))}
    captions: dict[object, list[str]] = {image: [] for image in images}
    for entry in entries(content, "annotations", path, ("image_id", "caption")):
        if entry["image_id"] not in captions:
            raise UserError(f"{path}: a caption of image {entry['image_id']}, which is not in 'images'")
        captions[entry["image_id"]].append(" ".join(entry["caption"].split()))
    for image, said in captions.items():
        yield images[image], said


def _listed(path: Path, what: str) -> Sequence:
    content = read_json(path, what)
    if not isinstance(content, list):
        raise UserError(f"{path}: {what} are a list")
    return content


def _require(path: Path, where: str, entry: object, keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(entry, Mapping) or key not in entry]
    if missing:
        raise UserError(f"{path}: {where} has no {missing[0]!r}")
