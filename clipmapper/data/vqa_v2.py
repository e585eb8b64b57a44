"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837) in the files that visualqa.org gives."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clipmapper.data.answers import AnswerVocabulary, most_frequent, normalised
from clipmapper.data.fields import ANSWERS, NUMBER, TEXT, Entries
from clipmapper.data.image_checks import readable_only
from clipmapper.data.official_files import check_image, coco_image
from clipmapper.data.record_table import together
from clipmapper.data.records import OTHER, Record, RecordData
from clipmapper.data.remembered import Found, remembered
from clipmapper.data.table_answers import unknown_answers
from clipmapper.data.table_builder import TableBuilder
from clipmapper.data.text_files import given_path, read_json
from clipmapper.errors import UserError
from clipmapper.progress import counted

_QUESTION = {"question_id": NUMBER, "image_id": NUMBER, "question": TEXT}
_ANNOTATION = {
    "question_id": NUMBER,
    "image_id": NUMBER.or_else(None),
    "answers": ANSWERS.or_else(None),
    "multiple_choice_answer": TEXT.or_else(None),
    # Some subsets of VQA v2 that go round have lost the answer types.
    "answer_type": TEXT.or_else(OTHER),
}
_UNANNOTATED = {"image_id": None, "answers": (), "answer_type": OTHER}


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
    decoding: str = "fast",
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
    accuracy, on_bad_image, check, decoding, workers : as of :func:`clipmapper.data.manifest.manifest_data`.

    Raises ``UserError`` for missing files, and ``UserErrors`` with every entry that is wrong and every
    question without an annotation. Numbers written as text, and answers that are numbers, are converted and
    counted.
    """
    root = given_path(folder)
    subsets = dict.fromkeys([*train, validation])
    wanted = [*subsets, *([] if test is None else [test])]
    counted = [
        subset
        for subset in ("train2014", "val2014")
        if subset in subsets or annotations_file(root, subset).is_file()
    ]

    def read(target: Path | None) -> Found:
        reading, table = _Reading(root), TableBuilder(target)
        for subset in wanted:
            table.extend(subset, reading.records(subset))
        usual = Counter(map(normalised, reading.usual_answers(counted)))
        finished = table.finish()
        return Found(finished.columns, finished.splits(), (), reading.notes, dict(usual))

    files = [questions_file(root, subset) for subset in wanted]
    files += [annotations_file(root, subset) for subset in dict.fromkeys([*subsets, *counted])]
    found = remembered("vqa_v2", files, {"folder": folder}, read)
    splits = {
        "train": together([found.splits[subset] for subset in train]),
        "validation": found.splits[validation],
    }
    if test is not None:
        splits["test"] = found.splits[test]
    answers = most_frequent(found.more, least_answers)
    if len(answers) < 2:
        raise UserError(f"data.least_answers={least_answers}: {len(answers)} answers occur that often")
    vocabulary = AnswerVocabulary(answers, targets)
    readable, notes = readable_only(splits, on_bad_image, check=check)
    notes += found.notes
    notes.append(f"answers: those of {least_answers} or more questions of {' and '.join(counted)}")
    if validation in train:
        notes.append(f"validation: {validation} is trained on, so its accuracy says nothing about new images")
    notes += unknown_answers(readable["validation"], vocabulary)
    return RecordData(
        readable, vocabulary, accuracy=accuracy, decoding=decoding, workers=workers, notes=notes
    )


def read_vqa_v2(folder: Path, subset: str) -> list[Record]:
    """The questions of one split, with all human answers where there are annotations."""
    return _Reading(folder).records(subset)


def questions_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"


def annotations_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_mscoco_{subset}_annotations.json"


class _Reading:
    """The files of one folder, each read once. ``notes``: what was converted or is not used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, []
        self._answered: dict[str, dict[int, Mapping]] = {}

    def records(self, subset: str) -> list[Record]:
        file = questions_file(self.folder, subset)
        content = read_json(file, f"the questions of {subset}")
        test = subset.startswith("test")
        images = "test2015" if test else subset
        answered = {} if test else self.annotations(subset)
        reading, texts, found = Entries(), {}, {}
        for entry in counted(reading.listed(content, "questions", file, _QUESTION), f"reading {file}"):
            number = entry["question_id"]
            if number in found:
                reading.wrong(entry["source"], "the same question twice", str(number))
                continue
            if not test and number not in answered:
                where = annotations_file(self.folder, subset)
                reading.wrong(str(where), f"a question of {file.name} is not annotated", str(number))
                continue
            annotation = answered.get(number, _UNANNOTATED)
            check_image(entry, annotation, reading)
            path = coco_image(self.folder, images, entry["image_id"])
            kind = annotation["answer_type"]
            found[number] = Record(
                id=number,
                image=path,
                image_id=str(path),
                question=entry["question"],
                answers=tuple(texts.setdefault(answer, answer) for answer in annotation["answers"]),
                family=texts.setdefault(kind, kind),
                source=f"{file.name}: question {number}",
            )
        reading.stop()
        if not found:
            raise UserError(f"{file}: no questions in it")
        self.notes += reading.notes(file.name)
        if unused := 0 if test else len(answered.keys() - found.keys()):
            self.notes.append(f"{annotations_file(self.folder, subset).name}: {unused} of "
                f"{len(answered)} annotations are of questions that are not asked")  # fmt: skip
        return list(found.values())

    def annotations(self, subset: str) -> dict[int, Mapping]:
        """Question → its annotation."""
        if subset in self._answered:
            return self._answered[subset]
        file = annotations_file(self.folder, subset)
        content = read_json(file, f"the annotations of {subset}")
        reading, found = Entries(), {}
        for entry in counted(reading.listed(content, "annotations", file, _ANNOTATION), f"reading {file}"):
            source, number, usual = entry.pop("source"), entry["question_id"], entry["multiple_choice_answer"]
            if entry["answers"] is None:
                if usual is None:
                    reading.wrong(source, "no 'answers'", "and no 'multiple_choice_answer' either")
                    continue
                entry["answers"] = [usual]
                reading.converted["'multiple_choice_answer' to the answers that are absent"] += 1
            if found.setdefault(number, entry) is not entry:
                reading.wrong(source, "the same question annotated twice", str(number))
        reading.stop()
        self.notes += reading.notes(file.name)
        self._answered[subset] = found
        return found

    def usual_answers(self, subsets: Sequence[str]) -> Iterator[str]:
        for subset in subsets:
            for entry in self.annotations(subset).values():
                usual = entry["multiple_choice_answer"]
                if usual is None:
                    usual = Counter(map(normalised, entry["answers"])).most_common(1)[0][0]
                yield usual
