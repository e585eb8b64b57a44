"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837) in the files that visualqa.org gives."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from clipmapper.data.answers import AnswerVocabulary, frequent_answers, normalised
from clipmapper.data.image_checks import readable_only
from clipmapper.data.official_files import coco_image, entries, read_json
from clipmapper.data.record_table import together
from clipmapper.data.records import OTHER, Record, RecordData
from clipmapper.data.remembered import Found, remembered
from clipmapper.data.table_answers import unknown_answers
from clipmapper.data.table_builder import TableBuilder
from clipmapper.errors import UserError
from clipmapper.progress import counted


def vqa_v2_data(
    folder: str,
    train: Sequence[str] = ("train2014",),
    validation: str = "val2014",
    test: str | None = None,
    *,
    least_answers: int = 9,
    targets: str = "soft",
    accuracy: str = "vqa",
    on_bad_image: str = "error",
    check: str = "full",
    workers: int = 0,
) -> RecordData:
    """``folder`` holds the official files under their own names, and COCO's images in folders of theirs.

    ``v2_OpenEnded_mscoco_train2014_questions.json``, ``v2_mscoco_train2014_annotations.json``, the same of
    val2014 and (questions only) of test2015 or test-dev2015; images such as
    ``train2014/COCO_train2014_000000000009.jpg``.

    Parameters
    ----------
    train, validation, test : the splits that are trained on, scored, and answered in a results file.
    least_answers : an answer that is the ``multiple_choice_answer`` of as many questions of train2014 and
        val2014 (where their annotations are there) is in the vocabulary: 3129 answers with 9, as is usual.
    targets : a key of :data:`clipmapper.data.answers.RULES`.
    accuracy, on_bad_image, check, workers : as of :func:`clipmapper.data.manifest.manifest_data`.

    Raises ``UserError`` for missing files and for questions without an annotation.
    """
    root = Path(folder)
    subsets = dict.fromkeys([*train, validation])
    wanted = [*subsets, *([] if test is None else [test])]

    def read(folder: Path | None) -> Found:
        table = TableBuilder(folder)
        for subset in wanted:
            records = read_vqa_v2(root, subset)
            table.extend(subset, counted(records, f"reading {subset}"))
        finished = table.finish()
        return Found(finished.columns, finished.splits())

    files = [questions_file(root, subset) for subset in wanted]
    files += [annotations_file(root, subset) for subset in subsets]
    found = remembered("vqa_v2", files, {"folder": folder}, read)
    splits = {
        "train": together([found.splits[subset] for subset in train]),
        "validation": found.splits[validation],
    }
    if test is not None:
        splits["test"] = found.splits[test]
    annotated = [
        subset
        for subset in ("train2014", "val2014")
        if subset in subsets or annotations_file(root, subset).is_file()
    ]
    answers = frequent_answers(_usual_answers(root, annotated), least_answers)
    if len(answers) < 2:
        raise UserError(f"data.least_answers={least_answers}: {len(answers)} answers occur that often")
    vocabulary = AnswerVocabulary(answers, targets)
    readable, notes = readable_only(splits, on_bad_image, check=check)
    notes = [*found.notes, *notes]
    notes.append(f"answers: those of {least_answers} or more questions of {' and '.join(annotated)}")
    if validation in train:
        notes.append(f"validation: {validation} is trained on, so its accuracy says nothing about new images")
    notes += unknown_answers(readable["validation"], vocabulary)
    return RecordData(readable, vocabulary, accuracy=accuracy, workers=workers, notes=notes)


def read_vqa_v2(folder: Path, subset: str) -> Iterator[Record]:
    """The questions of one split, with all human answers where there are annotations."""
    file = questions_file(folder, subset)
    questions = entries(
        read_json(file, f"the questions of {subset}"),
        "questions",
        file,
        ("question_id", "image_id", "question"),
    )
    images = "test2015" if subset.startswith("test") else subset
    answered = {} if subset.startswith("test") else _annotations(folder, subset)
    for entry in questions:
        number, image = entry["question_id"], entry["image_id"]
        if not subset.startswith("test") and number not in answered:
            where = annotations_file(folder, subset)
            raise UserError(f"{where}: question {number} of {file.name} is not annotated")
        answers, kind = answered.get(number, ((), OTHER))
        path = coco_image(folder, images, image)
        yield Record(
            id=number,
            image=path,
            image_id=str(path),
            question=entry["question"],
            answers=tuple(answers),
            family=kind,
            source=f"{file.name}: question {number}",
        )


def questions_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"


def annotations_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_mscoco_{subset}_annotations.json"


def _annotations(folder: Path, subset: str) -> dict[int, tuple[Sequence[str], str]]:
    # Some subsets of VQA v2 that go round have lost the answer types.
    return {
        entry["question_id"]: (_people(entry), entry.get("answer_type", OTHER))
        for entry in _annotated(folder, subset)
    }


def _usual_answers(folder: Path, subsets: Sequence[str]) -> Iterable[str]:
    for subset in subsets:
        for entry in _annotated(folder, subset):
            usual = entry.get("multiple_choice_answer")
            yield Counter(map(normalised, _people(entry))).most_common(1)[0][0] if usual is None else usual


def _people(entry: Mapping) -> list[str]:
    return [person["answer"] for person in entry["answers"]]


def _annotated(folder: Path, subset: str) -> Sequence:
    file = annotations_file(folder, subset)
    content = read_json(file, f"the annotations of {subset}")
    return entries(content, "annotations", file, ("question_id", "answers"))
