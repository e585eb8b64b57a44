"""Official files of public data sets in their layouts, made small."""

import json
from pathlib import Path

from PIL import Image

from clipmapper.data.readers.manifest import coco_image
from clipmapper.data.readers.vqa_v2 import annotations_file, questions_file


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 6), (10, 20, 30)).save(path)
    return path


def people(*answers: str) -> list[dict]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]


def vqa_v2_folder(folder: Path, *, questions: int = 4) -> Path:
    """Two images a split; the answers are "yes" and, one question in four, "2"."""
    for subset, first in (("train2014", 0), ("val2014", 100)):
        asked, annotated = [], []
        for n in range(questions):
            number, picture = 1000 * (first + n // 2) + n, first + n // 2
            image(coco_image(folder, subset, picture))
            answer = "yes" if n % 4 else "2"
            asked.append({"question_id": number, "image_id": picture, "question": f"q{n}?"})
            annotated.append({
                "question_id": number, "image_id": picture, "answers": people(*[answer] * 7, *["Two."] * 3),
                "answer_type": "number" if answer == "2" else "yes/no", "multiple_choice_answer": answer,
                "question_type": "what",
            })  # fmt: skip
        save(questions_file(folder, subset), {"questions": asked})
        save(annotations_file(folder, subset), {"annotations": annotated})
    image(coco_image(folder, "test2015", 7))
    asked = [{"question_id": 7000, "image_id": 7, "question": "of test?"}]
    save(questions_file(folder, "test-dev2015"), {"questions": asked})
    return folder


def coco_folder(folder: Path) -> Path:
    for subset, first in (("train2014", 0), ("val2014", 10)):
        numbers = range(first, first + 4)
        for n in numbers:
            image(coco_image(folder, subset, n))
        save(folder / "annotations" / f"captions_{subset}.json", {
            "images": [{"id": n, "file_name": coco_image(folder, subset, n).name} for n in numbers],
            "annotations": [
                {"id": 5 * n + k, "image_id": n, "caption": f"Caption {k}\n of {n} "}
                for k in range(5) for n in numbers
            ],
        })  # fmt: skip
    splits = {0: "train", 1: "train", 10: "restval", 11: "val", 12: "test"}
    save(folder / "dataset_coco.json", {"images": [{"cocoid": n, "split": s} for n, s in splits.items()]})
    return folder


def flickr_folder(folder: Path, layout: str = "token") -> Path:
    names = [f"{n}.jpg" for n in range(4)]
    for name in names:
        image(folder / "images" / name)
    pairs = [(name, k, f"A man, number {k}, runs .") for name in names for k in range(5)]
    text = {
        "token": [f"{name}#{k}\t{caption}" for name, k, caption in pairs],
        "comma": ["image,caption", *(f'{name},"{caption}"' for name, _, caption in pairs)],
        "bar": ["image_name| comment_number| comment", *(f"{n}| {k}| {c}" for n, k, c in pairs)],
    }[layout]
    (folder / "captions.txt").write_text("\n".join(text) + "\n")
    return folder
