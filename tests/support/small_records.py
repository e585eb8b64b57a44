"""A few records whose images are kept in different ways."""

from pathlib import Path

import numpy as np
from PIL import Image

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.records import Record

VOCABULARY = AnswerVocabulary(["red", "blue"])


class Stored:
    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def read(self) -> Image.Image:
        return self.image


def records_in(folder: Path) -> list[Record]:
    """Six questions about three images: a file, bytes, and a row of a data set."""
    pictures = [np.random.default_rng(n).integers(0, 256, (50 + n, 80, 3), dtype=np.uint8) for n in range(3)]
    folder.mkdir(exist_ok=True)
    for n in range(2):
        Image.fromarray(pictures[n]).save(folder / f"{n}.png")
    images = [folder / "0.png", (folder / "1.png").read_bytes(), Stored(Image.fromarray(pictures[2]))]
    asked = ["what is it?", "what colour is the thing on the left?"]
    return [
        Record(n, images[n % 3], str(n % 3), asked[n % 2], ("red",), captions=("a b", "c d e"))
        for n in range(6)
    ]
