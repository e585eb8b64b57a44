"""The record that every real data set is turned into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from clipmapper.data.images import as_pil
from clipmapper.data.truth import Truth
from clipmapper.errors import UserError

OTHER = "other"  # the family of a question whose data set has no answer types


@runtime_checkable
class StoredImage(Protocol):
    """An image that is fetched when it is needed, such as a row of a Hugging Face data set."""

    def read(self) -> bytes | Image.Image:
        """The encoded file, or the image."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question about an image, or one image with its captions.

    Attributes
    ----------
    id : the data set's own question (image) id, an int where the official results file wants one.
    image : path, the bytes of an image file, or a :class:`StoredImage`.
    image_id : the same for all records of an image; splits are made by it.
    question, answers, family : for visual question answering. ``answers`` are those that people gave, one an
        annotator: annotators are told apart by place, so data whose answers have no id (VizWiz) count right.
        None of them for a test split. ``family`` is the answer type (VQA v2) or whatever accuracies are
        reported by.
    captions : for captioning, what people wrote.
    source : file and line, for messages.
    truth : what decides the answer, where the data set knows it.
    """

    id: int | str
    image: Path | bytes | StoredImage
    image_id: str
    question: str | None = None
    answers: tuple[str, ...] = ()
    family: str = OTHER
    captions: tuple[str, ...] = ()
    source: str = ""
    truth: Truth | None = None

    def pil(self) -> Image.Image:
        """The image in RGB, turned upright by its EXIF orientation. Raises ``UserError`` with the source."""
        try:
            # (Whether something has the methods of a protocol takes half a millisecond to find out.)
            if not isinstance(self.image, Path | bytes) and isinstance(self.image, StoredImage):
                return as_pil(self.image.read())
            return as_pil(self.image)
        except UserError as error:
            raise UserError(f"{self.source}: {error}" if self.source else str(error)) from error
