"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837) in the files that visualqa.org gives."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from clipmapper.data.answers import AnswerVocabulary, most_frequent, normalised, unknown_answers
from clipmapper.data.image_checks import readable_only
from clipmapper.data.readers.fields import ANSWERS, NUMBER, TEXT, Entries
from clipmapper.data.readers.manifest import check_image, coco_image
from clipmapper.data.records import OTHER, Record, RecordData
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.tables.columns import together
from clipmapper.data.tables.remembered import Found, remembered
from clipmapper.data.text_files import given_path
from clipmapper.errors import UserError
from clipmapper.host.progress import counted


class Annotations:
    """Answers, answer type and image of questions.

    ``usual``: how often each normalised answer is a question's ``multiple_choice_answer`` or, where it has
    none, its most frequent answer.
    """

    def __init__(self) -> None:
        self.usual: Counter[str] = Counter()
        self._rows: dict[int, int] = {}
        self._texts: dict[str, int] = {}
        self._names: list[str] = []
        self._answers, self._starts, self._kinds = array("i"), array("q", [0]), array("i")
        self._images = array("q")

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, question: int) -> bool:
        return question in self._rows

    def add(
        self, question: int, answers: Sequence[str], kind: str, usual: str | None, image: int | None
    ) -> bool:
        """Add a question; False if it was there before."""
        if question in self._rows:
            return False
        self._rows[question] = len(self._rows)
        self._answers.extend(map(self._number, answers))
        self._starts.append(len(self._answers))
        self._kinds.append(self._number(kind))
        self._images.append(_UNSAID if image is None else image)
        if usual is None:
            usual = Counter(map(normalised, answers)).most_common(1)[0][0]
        self.usual[normalised(usual)] += 1
        return True

    def of(self, question: int) -> tuple[tuple[str, ...], str, int | None]:
        """The answers to a question, its answer type and its image, if the annotation says which."""
        row = self._rows[question]
        answers = self._answers[self._starts[row] : self._starts[row + 1]]
        image = None if self._images[row] == _UNSAID else self._images[row]
        return tuple(self._names[number] for number in answers), self._names[self._kinds[row]], image

    def _number(self, text: str) -> int:
        number = self._texts.setdefault(text, len(self._texts))
        if number == len(self._names):
            self._names.append(text)
        return number


_QUESTION = {"question_id": NUMBER, "image_id": NUMBER, "question": TEXT}
_ANNOTATION = {
    "question_id": NUMBER,
    "image_id": NUMBER.or_else(None),
    "answers": ANSWERS.or_else(None),
    "multiple_choice_answer": TEXT.or_else(None),
    # Some subsets of VQA v2 that go round have lost the answer types.
    "answer_type": TEXT.or_else(OTHER),
}


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
    augment: str = "none",
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
    accuracy, on_bad_image, check, decoding, workers, augment : as of
        :func:`clipmapper.data.readers.manifest.manifest_data`.

    Raises ``UserError`` for missing files, and ``UserErrors`` with every entry that is wrong and every
    question without an annotation. Numbers written as text, and answers that are numbers, are converted and
    counted.
    """
    root = given_path(folder)
    subsets = dict.fromkeys([*train, validation])
    wanted = [*subsets, *([] if test is None else [test])]
    with_answers = [
        subset
        for subset in ("train2014", "val2014")
        if subset in subsets or annotations_file(root, subset).is_file()
    ]

    def read(target: Path | None) -> Found:
        reading, table = QuestionFiles(root), TableBuilder(target)
        for subset in wanted:
            table.extend(subset, reading.records(subset))
        usual = reading.usual_answers(with_answers)
        finished = table.finish()
        return Found(finished.columns, finished.splits(), (), reading.notes, dict(usual))

    files = [questions_file(root, subset) for subset in wanted]
    files += [annotations_file(root, subset) for subset in dict.fromkeys([*subsets, *with_answers])]
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
    notes.append(f"answers: those of {least_answers} or more questions of {' and '.join(with_answers)}")
    if validation in train:
        notes.append(f"validation: {validation} is trained on, so its accuracy says nothing about new images")
    notes += unknown_answers(readable["validation"], vocabulary)
    return RecordData(
        readable,
        vocabulary,
        accuracy=accuracy,
        decoding=decoding,
        workers=workers,
        augment=augment,
        notes=notes,
    )


def questions_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"


def annotations_file(folder: Path, subset: str) -> Path:
    return folder / f"v2_mscoco_{subset}_annotations.json"


class QuestionFiles:
    """The files of one folder, each read once. ``notes``: what was converted or is not used. ``usual``: of
    each subset whose annotations were read (:class:`~clipmapper.data.readers.vqa_v2.Annotations`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, []
        self.usual: dict[str, Counter[str]] = {}

    def records(self, subset: str) -> Iterator[Record]:
        """Yield the questions of one split, with all human answers where there are annotations."""
        file = questions_file(self.folder, subset)
        reading, seen = Entries(), set()
        entries = reading.of_file(file, "questions", f"the questions of {subset}", _QUESTION)
        first = list(islice(entries, 1))  # what is wrong with the file is said before that of annotations
        test = subset.startswith("test")
        images = "test2015" if test else subset
        answered = Annotations() if test else self.annotations(subset)
        for entry in counted(chain(first, entries), f"reading {file}"):
            number = entry["question_id"]
            if number in seen:
                reading.wrong(entry["source"], "the same question twice", str(number))
                continue
            if not test and number not in answered:
                where = annotations_file(self.folder, subset)
                reading.wrong(str(where), f"a question of {file.name} is not annotated", str(number))
                continue
            seen.add(number)
            answers, kind, about = ((), OTHER, None) if test else answered.of(number)
            check_image(entry, about, reading)
            path = coco_image(self.folder, images, entry["image_id"])
            yield Record(
                id=number,
                image=path,
                image_id=str(path),
                question=entry["question"],
                answers=answers,
                family=kind,
                source=f"{file.name}: question {number}",
            )
        reading.stop()
        if not seen:
            raise UserError(f"{file}: no questions in it")
        self.notes += reading.notes(file.name)
        if unused := 0 if test else len(answered) - len(seen):
            self.notes.append(f"{annotations_file(self.folder, subset).name}: {unused} of "
                f"{len(answered)} annotations are of questions that are not asked")  # fmt: skip

    def annotations(self, subset: str) -> Annotations:
        file = annotations_file(self.folder, subset)
        reading, found = Entries(), Annotations()
        of_file = reading.of_file(file, "annotations", f"the annotations of {subset}", _ANNOTATION)
        for entry in counted(of_file, f"reading {file}"):
            source, number, usual = entry["source"], entry["question_id"], entry["multiple_choice_answer"]
            answers = entry["answers"]
            if answers is None:
                if usual is None:
                    reading.wrong(source, "no 'answers'", "and no 'multiple_choice_answer' either")
                    continue
                answers = [usual]
                reading.converted["'multiple_choice_answer' to the answers that are absent"] += 1
            if not found.add(number, answers, entry["answer_type"], usual, entry["image_id"]):
                reading.wrong(source, "the same question annotated twice", str(number))
        reading.stop()
        self.notes += reading.notes(file.name)
        self.usual[subset] = found.usual
        return found

    def usual_answers(self, subsets: Sequence[str]) -> Counter[str]:
        """How often each answer is the usual one of a question."""
        for subset in subsets:
            if subset not in self.usual:
                self.annotations(subset)
        return sum((self.usual[subset] for subset in subsets), Counter())


_UNSAID = -1  # images are numbered from 0
