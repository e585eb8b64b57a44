"""Your own data: one manifest (or a file a split), a line for each question or image with captions.

Checks of images' paths that the files of several public data sets need as well.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from clipmapper.data.answers import AnswerVocabulary, answer_vocabulary, unknown_answers
from clipmapper.data.image_checks import readable_only
from clipmapper.data.readers.fields import NUMBER, TEXT, Entries, shown
from clipmapper.data.readers.manifest_files import manifest_rows
from clipmapper.data.readers.rows import RowReader
from clipmapper.data.record import Problem, stop_for
from clipmapper.data.records import RecordData
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.tables.columns import RecordTable, together
from clipmapper.data.tables.remembered import Found, remembered
from clipmapper.data.tables.whole import fold_by_image, shared_images, split_by_image, table_of_whole
from clipmapper.data.text_files import given_path
from clipmapper.errors import UserError
from clipmapper.host.progress import counted

_NAMED = 10  # columns in a note


def manifest_data(
    path: str,
    validation_path: str | None = None,
    test_path: str | None = None,
    images: str | None = None,
    *,
    least_answers: int = 1,
    targets: str = "soft",
    accuracy: str = "vqa",
    validation_share: float = 0.1,
    split_seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
    on_bad_image: str = "error",
    decoding: str = "fast",
    check: str = "full",
    workers: int = 0,
    augment: str = "none",
) -> RecordData:
    """Read one file with all splits, or one for each.

    Parameters
    ----------
    path : .jsonl (or .json), .csv (or .tsv) or .parquet. Columns: ``image`` (a path, relative to ``images``
        or else to the file; in Parquet also bytes) or ``image_base64``; ``question`` and ``answers`` (one or
        several), or ``captions``; and, if wanted, ``id``, ``family`` (what scores are reported by) and
        ``split``.
    validation_path, test_path : files of these splits; then ``path`` is for training.
    least_answers : how often an answer occurs in training to be one that the model can give.
    targets : how right an answer is: a key of :data:`clipmapper.data.answers.RULES`.
    accuracy : a key of :data:`clipmapper.data.answers.ACCURACIES`.
    validation_share, split_seed : of the images, where no split for validation is given.
    folds, fold : of all images but those of the test split, as many parts, and which of them (from 1 on) is
        for validation; those that are given for validation train in turn.
    on_bad_image : "error" or "skip".
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    check : which images are opened before training: "full", all that were not yet found readable as they are
        now (by size and time); "sample", a few hundred of them, drawn by a fixed seed; "none".
    workers : processes that decode images while training.
    augment : how images of training are altered, one of :data:`clipmapper.data.augment.AUGMENT`.

    Raises ``UserErrors`` with everything that is wrong, before anything else happens.
    """
    if images is not None and not given_path(images).is_dir():
        raise UserError(f"data.images={images}: no such folder")
    files = {"train": path, "validation": validation_path, "test": test_path}
    given = {split: given_path(file) for split, file in files.items() if file is not None}

    def read(folder: Path | None) -> Found:
        table, readers = TableBuilder(folder), []
        for split, file in given.items():
            rows = RowReader(file.parent if images is None else given_path(images), table)
            count = 0
            for source, row in counted(manifest_rows(file), f"reading {file}"):
                count += 1
                if isinstance(row, Problem):
                    rows.problems.append(row)
                else:
                    rows.add(source, row, split if len(given) > 1 else None)
            if not count:
                rows.problems.append(Problem(str(file), "no lines in it"))
            readers.append(rows)
        problems = [problem for rows in readers for problem in rows.problems]
        return table_of_whole(table.finish(), problems, notes_of(readers))

    settings = {"splits": list(given), "images": images}
    return data_of(
        remembered("manifest", list(given.values()), settings, read),
        where=path,
        least_answers=least_answers,
        targets=targets,
        accuracy=accuracy,
        validation_share=validation_share,
        split_seed=split_seed,
        folds=folds,
        fold=fold,
        on_bad_image=on_bad_image,
        decoding=decoding,
        check=check,
        workers=workers,
        augment=augment,
        folder=given["train"].parent if images is None else given_path(images),
    )


def notes_of(readers: Sequence[RowReader]) -> list[str]:
    """How many questions' answers are not as they were written, and which columns were not read."""
    count = sum(reader.normalised for reader in readers)
    notes = [f"answers: normalised where all of a question were alike, of {count} questions"] * bool(count)
    unread = sorted({shown(name) for reader in readers for name in reader.unread})
    if unread:
        more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
        notes.append(f"columns that are not read: {', '.join(unread[:_NAMED])}{more}")
    return notes


def data_of(
    found: Found,
    *,
    where: str,
    least_answers: int = 1,
    targets: str = "soft",
    accuracy: str = "vqa",
    validation_share: float,
    split_seed: int,
    folds: int | None = None,
    fold: int | None = None,
    on_bad_image: str,
    decoding: str,
    check: str,
    workers: int,
    augment: str,
    folder: Path | None = None,
) -> RecordData:
    """Check records as a whole and complete their splits. ``where``: the name of the data in messages;
    ``folder``: what their images lie in.

    Records of ``found`` whose split is not given are under None.
    """
    named = {name: some for name, some in found.splits.items() if name is not None}
    named = named or {"train": found.splits.get(None, RecordTable(found.columns))}
    readable, notes = readable_only(named, on_bad_image, found.problems, check=check)
    notes = [*found.notes, *notes]
    if not any(map(len, readable.values())):
        stop_for([Problem(where, "no records", f"its splits are {', '.join(readable) or 'none'}")])
    train = readable.get("train", ())
    if folds is not None and not {"train", "validation"}.isdisjoint(readable):
        given = [readable.pop(name) for name in ("train", "validation") if name in readable]
        images = np.unique(np.concatenate([some.images for some in given]))
        if len(images) < folds:
            stop_for([Problem(where, "fewer images than data.folds", f"{len(images)}, but {folds} parts")])
        if fold is None:
            raise UserError(
                f"data.folds={folds}: data.fold says which part is for validation, 1 to {folds}; only "
                "training takes one after the other by itself"
            )
        readable["train"], readable["validation"] = fold_by_image(
            together(given), fold, folds, split_seed, folder
        )
        notes.append(
            f"validation: part {fold} of {folds} of the images (data.folds), by data.split_seed={split_seed}"
        )
    elif len(train) and "validation" not in readable:
        if (train.images == train.images[0]).all():
            stop_for([Problem(where, "only one image", "validation needs another")])
        readable["train"], readable["validation"] = split_by_image(
            train, validation_share, split_seed, folder
        )
        notes.append(f"validation: images of train, drawn by data.split_seed={split_seed}")
    train, vocabulary = readable.get("train", ()), None
    if not len(train):  # to be scored or explained: the model says which answers it has
        notes.append("nothing to train on: no record is of the split train")
        some = next(some for some in readable.values() if len(some))
        vocabulary = None if some[0].question is None else AnswerVocabulary((), targets)
    elif not train[0].captions:
        vocabulary = answer_vocabulary(readable["train"], least_answers, targets)
        if len(vocabulary) < 2:
            what = f"{len(vocabulary)} that occur {least_answers} times (data.least_answers)"
            stop_for([Problem(where, "fewer than two different answers in train", what)])
        notes += unknown_answers(readable["validation"], vocabulary)
    if len(train):
        notes += shared_images(readable)
    order = [name for name in ("train", "validation", "test") if len(readable.get(name, ()))]
    return RecordData(
        {name: readable[name] for name in order},
        vocabulary,
        accuracy=accuracy,
        decoding=decoding,
        workers=workers,
        augment=augment,
        notes=notes,
    )


_IMAGE = {"id": NUMBER, "file_name": TEXT, "domain": TEXT.or_else(None)}
_CAPTION = {"image_id": NUMBER, "caption": TEXT}


@lru_cache(maxsize=1 << 12)  # several questions in succession are about one image
def coco_image(folder: Path, subset: str, image: int) -> Path:
    """``train2014/COCO_train2014_000000000009.jpg``; of 2017 without the prefix."""
    prefix = "" if subset.endswith("2017") else f"COCO_{subset}_"
    return folder / subset / f"{prefix}{image:012d}.jpg"


def leads_out(name: str) -> bool:
    """Whether an image of this name, as an official file has it, lies outside the folder of images."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def check_image(question: Mapping, said: int | None, reading: Entries) -> None:
    """Take note of a question whose annotation is about another image: their files do not belong together."""
    if said is not None and said != question["image_id"]:
        what = f"{question['image_id']}, in the annotation {said}"
        reading.wrong(question["source"], "another image than its annotation's", what)


def captioned_images(path: Path, what: str, reading: Entries) -> list[tuple[Mapping, list[str]]]:
    """Read a file such as COCO's: each image's entry with its captions, in the order of the images.

    ``reading`` takes note of entries that are wrong, of images that are there twice, and of captions of an
    image that is not there. Raises ``UserError`` where the file is none of that kind.
    """
    images: dict[int, Mapping] = {}
    for image in counted(reading.of_file(path, "images", what, _IMAGE), f"reading {path}, images"):
        if leads_out(image["file_name"]):
            reading.wrong(image["source"], "'file_name' leads out of the images' folder", image["file_name"])
        if images.setdefault(image["id"], image) is not image:
            first = images[image["id"]]["source"].rpartition(": ")[2]
            reading.wrong(image["source"], "the same image twice", f"{image['id']} is that of {first} too")
    complete = not reading.problems  # else captions of images that are there would be told too
    captions: dict[int, list[str]] = {image: [] for image in images}
    told = reading.of_file(path, "annotations", what, _CAPTION)
    for entry in counted(told, f"reading {path}, captions"):
        image = entry["image_id"]
        if image in captions:
            captions[image].append(" ".join(entry["caption"].split()))
        elif complete:
            reading.wrong(entry["source"], "a caption of an image that is not in 'images'", str(image))
    return [(images[image], said) for image, said in captions.items()]
