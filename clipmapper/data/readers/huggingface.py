"""Data sets of the ``datasets`` library: a folder that ``save_to_disk`` wrote, or an object in Python."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipmapper.data.readers.manifest import data_of, notes_of
from clipmapper.data.readers.manifest_files import named, namings
from clipmapper.data.readers.rows import RowReader
from clipmapper.data.records import RecordData
from clipmapper.data.tables.builder import TableBuilder
from clipmapper.data.tables.remembered import FOLDER, Found, remembered
from clipmapper.data.tables.whole import table_of_whole
from clipmapper.data.text_files import given_path
from clipmapper.errors import UserError
from clipmapper.host.progress import counted

_KNOWN_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


class RowImage:
    """The image of one row, read when it is needed: the data set is memory-mapped."""

    def __init__(self, images: Any, row: int, name: str) -> None:
        self.images, self.row, self.name = images, row, name

    def read(self) -> bytes | Image.Image:
        """The bytes of the file. Raises ``UserError`` where the row has neither bytes nor a file."""
        stored = self.images[self.row]["image"]
        if isinstance(stored, Image.Image):
            return stored
        if stored and stored.get("bytes"):
            return stored["bytes"]
        if not stored or not stored.get("path"):
            raise UserError("the row has neither an image's bytes nor a path")
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise UserError(f"image={stored['path']}: {error.strerror}") from error

    def __str__(self) -> str:
        return self.name


class RowImages(Sequence[RowImage]):
    """The images of several data sets, one behind the other. ``parts``: images and the name of each."""

    def __init__(self, parts: Sequence[tuple[Any, str]]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(images) for images, _ in self.parts)

    def __getitem__(self, number: int) -> RowImage:
        for images, name in self.parts:
            if number < len(images):
                return RowImage(images, number, f"{name}:row {number + 1}")
            number -= len(images)
        raise IndexError(number)


def huggingface_data(
    path: str,
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
    """A folder that ``save_to_disk`` wrote, with the columns of a manifest; ``image`` is an ``Image`` feature
    or a path. Parameters and errors otherwise as of
    :func:`clipmapper.data.readers.manifest.manifest_data`.
    """
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(given_path(path)))
    except Exception as error:  # a damaged folder makes the library raise whatever comes
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"data.path={path}: not a data set that save_to_disk wrote ({what})") from error
    return records_of(
        found,
        name=path,
        folder=given_path(path),
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
    )


def records_of(
    data: Any,
    *,
    name: str = "data",
    folder: Path | None = None,
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
    """A ``datasets.Dataset`` or ``DatasetDict`` as data to train on. ``name`` is what messages call it,
    ``folder`` where the data lie (None: what is read of them is not remembered).

    Of a ``DatasetDict`` the splits train, validation (or val) and test are read; others raise ``UserError``.
    """
    datasets = _library()
    if not isinstance(data, datasets.DatasetDict | datasets.Dataset):
        advice = "; load it without streaming=True" if "Iterable" in type(data).__name__ else ""
        raise UserError(f"{name}: {type(data).__name__}, not a datasets.Dataset or DatasetDict{advice}")
    parts: Mapping[str | None, Any] = data if isinstance(data, datasets.DatasetDict) else {None: data}
    unknown = [split for split in parts if split is not None and split not in _KNOWN_SPLITS]
    if unknown:
        raise UserError(f"{name}: split {unknown[0]!r} is not one of {', '.join(_KNOWN_SPLITS)}")
    prefixes = {split: name if split is None else f"{name}[{split}]" for split in parts}
    for split, part in parts.items():
        if "image" not in part.column_names:
            raise UserError(f"{prefixes[split]}: no column image; there are {', '.join(part.column_names)}")
    stored = RowImages([
        (_encoded_images(part), prefixes[split]) for split, part in parts.items() if _is_encoded(part)
    ])  # fmt: skip

    def read(target: Path | None) -> Found:
        table = TableBuilder(target)
        reader = RowReader(Path(), table)
        for split, part in parts.items():
            encoded = _is_encoded(part)
            part = part.with_format(None)  # the user's own (numpy, torch, pandas) gives other types
            labels = namings(part.features.to_dict())
            images = _encoded_images(part) if encoded else None
            # Without the images: they would be read from the disk for nothing.
            rows = part.remove_columns("image") if encoded else part
            for number in counted(range(len(part)), f"reading {prefixes[split]}", len(part)):
                row = dict(rows[number]) if rows.column_names else {}
                row = named(row, labels) if labels else row
                source = f"{prefixes[split]}:row {number + 1}"
                if encoded:
                    row["image"] = RowImage(images, number, source)
                reader.add(source, row, _KNOWN_SPLITS.get(split))
        found = table_of_whole(table.finish(), reader.problems, notes_of([reader]))
        if not found.problems:
            found.columns.objects = stored  # the same images, made when they are asked for
        return found

    return data_of(
        read(None)
        if folder is None
        else remembered("huggingface", _files(folder), {"name": name}, read, stored),
        where=name,
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
    )


def _is_encoded(part: Any) -> bool:
    return isinstance(part.features["image"], _library().Image)


def _encoded_images(part: Any) -> Any:
    """The images of a data set as the files that they are."""
    return (
        part.with_format(None).select_columns(["image"]).cast_column("image", _library().Image(decode=False))
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and FOLDER not in path.parts)


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "Hugging Face data sets need the datasets library; pip install 'clipmapper[data]'"
        ) from error
