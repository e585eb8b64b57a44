"""The built-in world as a data set: its splits are drawn and rendered when they are first asked for."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from clipmapper.data.answers import AnswerVocabulary
from clipmapper.data.images import clip_input
from clipmapper.data.record import Record
from clipmapper.data.records import RecordData
from clipmapper.data.tables.base import RecordList
from clipmapper.data.world.scenes import MAX_OBJECTS, Scene, draw_scene, render_all


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """A :class:`~clipmapper.data.record.StoredImage` of a scene."""

    pixels: UInt8[np.ndarray, "height width 3"]

    def read(self) -> Image.Image:
        return Image.fromarray(self.pixels)


class RenderedReader:
    """Rendered images as ``visual`` (an ``open_clip`` image tower) reads them, normalised: so small that many
    at once are little to move."""

    fast = False

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual

    def __call__(self, record: Record) -> Float[Tensor, "3 height width"]:
        return self.many([record])[0]

    def many(self, records: Sequence[Record]) -> Float[Tensor, "records 3 height width"]:
        return clip_input(np.stack([record.image.pixels for record in records]), self.visual)


class World(RecordData):
    """Splits of the built-in world never share a scene.

    Parameters: ``sizes``, numbers of scenes of each split (train, simple, validation, held_out). "simple" has
    scenes of one or two objects and is for the first part of training; "held_out" is about colour-shape
    combinations that training never sees.
    """

    validation_splits = ("validation", "held_out")
    labelled_at_most = 500
    drawn_anew = True

    def __init__(
        self, sizes: tuple[int, int, int, int], seed: int, vocabulary: AnswerVocabulary | None
    ) -> None:
        super().__init__({}, vocabulary)
        self.seed = seed
        self.sizes = dict(zip(("train", "simple", "validation", "held_out"), sizes, strict=True))
        self.splits = _Drawn(self.sizes, self._drawn)

    @abstractmethod
    def records(self, name: str, scenes: list[Scene]) -> RecordList:
        """The records of a split."""

    def rendered(
        self, scenes: list[Scene]
    ) -> tuple[list[RenderedImage], Sequence[UInt8[np.ndarray, "height width"]]]:
        """The images, and which object is seen at each of their pixels (0: none)."""
        images, instances = render_all(scenes)
        return [RenderedImage(image) for image in images], list(instances)

    def reader(self, encoder: nn.Module) -> RenderedReader:
        return RenderedReader(encoder.clip.visual)

    def summary(self) -> Iterator[str]:
        """The scenes are rendered here."""
        began, images = time.monotonic(), sum(self.sizes.values())
        for name in self.sizes:
            _ = self.splits[name]
        seconds = time.monotonic() - began
        yield f"{images} scenes rendered in {seconds:.0f} s ({images / seconds:.0f} images/s)"

    def _drawn(self, name: str) -> RecordList:
        objects = (1, 2) if name == "simple" else (1, MAX_OBJECTS)
        scenes = [
            draw_scene(self.seed, name, index, objects=objects, held_out=name == "held_out")
            for index in range(self.sizes[name])
        ]
        return self.records(name, scenes)


class _Drawn(Mapping[str, RecordList]):
    def __init__(self, names: Mapping[str, int], draw: Callable[[str], RecordList]) -> None:
        self.names, self.draw, self.found = names, draw, {}

    def __getitem__(self, name: str) -> RecordList:
        if name not in self.names:
            raise KeyError(name)
        if name not in self.found:
            self.found[name] = self.draw(name)
        return self.found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
