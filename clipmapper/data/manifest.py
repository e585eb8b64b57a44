"""Your own data: one manifest (or a file a split), a line for each question or image with captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from clipmapper.data.answers import answer_vocabulary
from clipmapper.data.image_checks import readable_only
from clipmapper.data.manifest_files import manifest_rows
from clipmapper.data.problems import Problem, stop_for
from clipmapper.data.records import Record, RecordData
from clipmapper.data.rows import RowReader
from clipmapper.data.splitting import split_by_image
from clipmapper.data.text_files import given_path
from clipmapper.errors import UserError


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
    on_bad_image: str = "error",
    decoding: str = "fast",
    workers: int = 0,
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
    on_bad_image : "error" or "skip".
    decoding : how photographs are read, one of :data:`clipmapper.data.pixels.DECODING`.
    workers : processes that decode images while training.

    Raises ``UserErrors`` with everything that is wrong, before anything else happens.
    """
    if images is not None and not given_path(images).is_dir():
        raise UserError(f"data.images={images}: no such folder")
    files = {"train": path, "validation": validation_path, "test": test_path}
    several = validation_path is not None or test_path is not None
    readers = []
    for split, file in files.items():
        if file is None:
            continue
        folder = given_path(file).parent if images is None else given_path(images)
        reader = RowReader(folder, readers[0] if readers else None)
        count = 0
        for source, row in manifest_rows(given_path(file)):
            count += 1
            if isinstance(row, Problem):
                reader.problems.append(row)
            else:
                reader.add(source, row, split if several else None)
        if not count:
            reader.problems.append(Problem(file, "no lines in it"))
        readers.append(reader)
    problems = [problem for reader in readers for problem in reader.problems]
    splits: dict[str | None, list[Record]] = {}
    for reader in readers:
        for name, records in reader.splits.items():
            splits.setdefault(name, []).extend(records)
    return data_of(
        splits,
        problems,
        where=path,
        least_answers=least_answers,
        targets=targets,
        accuracy=accuracy,
        validation_share=validation_share,
        split_seed=split_seed,
        on_bad_image=on_bad_image,
        decoding=decoding,
        workers=workers,
        notes=normalised_notes(readers),
    )


def normalised_notes(readers: Sequence[RowReader]) -> list[str]:
    """How many questions' answers are not as they were written."""
    count = sum(reader.normalised for reader in readers)
    return [f"answers: normalised where all of a question were alike, of {count} questions"] * bool(count)


def data_of(
    splits: dict[str | None, list[Record]],
    problems: Sequence[Problem],
    *,
    where: str,
    least_answers: int,
    targets: str,
    accuracy: str,
    validation_share: float,
    split_seed: int,
    on_bad_image: str,
    decoding: str,
    workers: int,
    notes: Sequence[str] = (),
) -> RecordData:
    """Check records as a whole and complete their splits. ``where``: the name of the data in messages.

    ``splits``: records whose split is not given are under None.
    """
    records = [record for some in splits.values() for record in some]
    problems = [*problems, *_mixed(records), *_partly_split(splits), *_families_of_captions(splits)]
    named = {name: some for name, some in splits.items() if name is not None}
    readable, left_out = readable_only(named or {"train": splits.get(None, [])}, on_bad_image, problems)
    notes = [*left_out, *notes]
    if records and records[0].captions:
        readable = {name: _captions_together(some) for name, some in readable.items()}
    train = readable.get("train", [])
    if not train:
        stop_for([Problem(where, "nothing to train on", f"its splits are {', '.join(readable) or 'none'}")])
    if "validation" not in readable:
        if len({record.image_id for record in train}) < 2:
            stop_for([Problem(where, "only one image", "validation needs another")])
        readable["train"], readable["validation"] = split_by_image(train, validation_share, split_seed)
        notes.append(f"validation: images of train, drawn by data.split_seed={split_seed}")
    notes += _shared_images(readable)
    vocabulary = None
    if not records[0].captions:
        vocabulary = answer_vocabulary((r.answers for r in readable["train"]), least_answers, targets)
        if len(vocabulary) < 2:
            what = f"{len(vocabulary)} that occur {least_answers} times (data.least_answers)"
            stop_for([Problem(where, "fewer than two different answers in train", what)])
        notes += unknown_answers(readable["validation"], vocabulary)
    order = [name for name in ("train", "validation", "test") if readable.get(name)]
    return RecordData(
        {name: readable[name] for name in order},
        vocabulary,
        accuracy=accuracy,
        decoding=decoding,
        workers=workers,
        notes=notes,
    )


def unknown_answers(records: Sequence[Record], vocabulary) -> list[str]:
    """How many questions the model can't get right, whatever it learns."""
    lost = sum(not vocabulary.targets(record.answers).any() for record in records)
    if not lost:
        return []
    return [f"validation: {lost} of {len(records)} questions have no answer among the {len(vocabulary)}"]


def _mixed(records: Sequence[Record]) -> list[Problem]:
    """Questions among captions, or captions among questions: whichever are fewer."""
    kinds = Counter("captions" if record.captions else "a question" for record in records)
    if len(kinds) < 2:
        return []
    (usual, times), (odd, _) = kinds.most_common()
    what = f"{odd} here, {usual} on {times} other lines"
    return [
        Problem(record.source, "questions and captions in one data set", what)
        for record in records
        if bool(record.captions) == (odd == "captions")
    ]


def _partly_split(splits: dict[str | None, list[Record]]) -> list[Problem]:
    if len(splits) < 2 or None not in splits:
        return []
    return [Problem(record.source, "no split", "other lines have one") for record in splits[None]]


def _families_of_captions(splits: dict[str | None, list[Record]]) -> list[Problem]:
    """In a split an image is in one family, however many lines its captions have."""
    found = []
    for records in splits.values():
        first: dict[str, Record] = {}
        for record in records:
            known = first.setdefault(record.image_id, record)
            if record.captions and record.family != known.family:
                what = f"{record.family!r}, but {known.family!r} on {known.source}"
                found.append(Problem(record.source, "another family than the image's", what))
    return found


def _captions_together(records: Sequence[Record]) -> list[Record]:
    """One record for each image, with all of its captions."""
    by_image: dict[str, list[Record]] = {}
    for record in records:
        by_image.setdefault(record.image_id, []).append(record)
    return [
        replace(some[0], captions=tuple(caption for record in some for caption in record.captions))
        for some in by_image.values()
    ]


def _shared_images(splits: dict[str, list[Record]]) -> list[str]:
    images = {name: {record.image_id for record in records} for name, records in splits.items()}
    return [
        f"{name}: {len(images[name] & images['train'])} of its {len(images[name])} images are in train too"
        for name in ("validation", "test")
        if images.get(name, set()) & images["train"]
    ]
