"""Questions that can be asked about a built-in scene, family by family, before a wording is chosen."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from clipmapper.data.world.captions import RELATION_MARGIN, describe, plural
from clipmapper.data.world.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene, SceneObject

DIRECTIONS = ("left", "right", "above", "below")
_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Candidate:
    """A question that a scene allows. ``stratum``: what its wording gives away of the answer."""

    stratum: tuple[str, ...]
    answer: str
    objects: tuple[int, ...]
    slots: dict[str, str]
    combinations: tuple[tuple[str, str], ...]  # colour–shape pairs that the question is about
    kind: str = ""  # of the questions of a family, one that is to have a share of its own
    told_by_size: bool = False  # two objects are alike but for their size, which tells the one that is meant


def _unique(values: Sequence) -> list[int]:
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _look(asked: str, by: str) -> Callable[[Scene, random.Random], Iterator[Candidate]]:
    """Ask for the colour of the object of a shape, or for the shape of the one of a colour."""

    def candidates(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
        items, named = scene.objects, [getattr(o, by) for o in scene.objects]
        alone = _unique(named)
        for i in alone:
            o, name = items[i], named[i]
            yield Candidate((asked, name, ""), getattr(o, asked), (i,), {"a": name}, (o.combination,))
        for i in _unique([(o.size, name) for o, name in zip(items, named, strict=True)]):
            o, name, two = items[i], named[i], i not in alone
            stratum, slots = (asked, name, o.size), {"a": f"{o.size} {name}"}
            yield Candidate(stratum, getattr(o, asked), (i,), slots, (o.combination,), told_by_size=two)

    return candidates


def _existence(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    items = scene.objects
    combinations = {o.combination for o in items}
    colours, shapes = {o.colour for o in items}, {o.shape for o in items}
    for colour in COLOURS:
        for shape in SHAPES:
            together = (colour, shape) in combinations
            hard = colour in colours and shape in shapes
            kind = "yes" if together else "hard no" if hard else "easy no"
            matching = [i for i, o in enumerate(items) if o.combination == (colour, shape)]
            near = [i for i, o in enumerate(items) if o.colour == colour or o.shape == shape]
            objects = tuple(matching or near or range(len(items)))
            # Balanced for each colour and shape asked for: no combination is a hint.
            stratum = ("existence", colour, shape)
            answer = "yes" if together else "no"
            yield Candidate(stratum, answer, objects, {"a": f"{colour} {shape}"}, ((colour, shape),), kind)


def _counting(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    items = scene.objects
    for kind, values in (("colour", COLOURS), ("shape", SHAPES)):
        for value in values:
            counted = tuple(i for i, o in enumerate(items) if getattr(o, kind) == value)
            if len(counted) > 3:
                continue
            name = plural(value) if kind == "shape" else f"{value} things"
            about = tuple(items[i].combination for i in counted)
            objects = counted or tuple(range(len(items)))
            yield Candidate(("counting", kind), str(len(counted)), objects, {"a": name}, about)


def _pairs(scene: Scene) -> Iterator[tuple[int, int, SceneObject, SceneObject]]:
    items = scene.objects
    named = _unique([o.combination for o in items])
    for i, j in permutations(named, 2):
        yield i, j, items[i], items[j]


def _names(a: SceneObject, b: SceneObject) -> dict[str, str]:
    return {"a": describe(a, size=False), "b": describe(b, size=False)}


def _lies(a: SceneObject, b: SceneObject, margin: float = RELATION_MARGIN) -> Iterator[str]:
    """Where ``a`` is clearly found as seen from ``b``; may be two directions, one of each axis."""
    if abs(a.x - b.x) >= margin:
        yield "left" if a.x < b.x else "right"
    if abs(a.y - b.y) >= margin:
        yield "above" if a.y < b.y else "below"


def _axis(direction: str) -> str:
    return "across" if direction in ("left", "right") else "along"


def _opposite(direction: str) -> str:
    return {"left": "right", "right": "left", "above": "below", "below": "above"}[direction]


def _place(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    """Ask of one object what ``relation_choose`` asks of two: a mapper learns that one from this one."""
    items = scene.objects
    middle = SceneObject("", "", "", IMAGE_SIZE / 2, IMAGE_SIZE / 2, 0.0, 0.0)
    for i in _unique([o.combination for o in items]):
        for direction in _lies(items[i], middle):
            first, second = rng.sample((direction, _opposite(direction)), 2)
            slots = {"a": describe(items[i], size=False), "d": _PHRASE[first], "e": _PHRASE[second]}
            stratum = ("place", _axis(direction))
            yield Candidate(stratum, direction, (i,), slots, (items[i].combination,))


def _size(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    """Ask of one object what ``comparison`` asks of two."""
    items = scene.objects
    for i in _unique([o.combination for o in items]):
        first, second = rng.sample(SIZES, 2)
        slots = {"a": describe(items[i], size=False), "d": first, "e": second}
        yield Candidate(("size",), items[i].size, (i,), slots, (items[i].combination,))


def _relation_choose(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    for i, j, a, b in _pairs(scene):
        for direction in _lies(a, b):
            first, second = rng.sample((direction, _opposite(direction)), 2)
            slots = _names(a, b) | {"d": _PHRASE[first], "e": _PHRASE[second]}
            stratum = ("relation_choose", _axis(direction))
            yield Candidate(stratum, direction, (i, j), slots, (a.combination, b.combination))


def _relation_open(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    """Only where one object is clearly in that direction and every other one is not at all."""
    items = scene.objects
    for i in _unique([o.combination for o in items]):
        a = items[i]
        for direction in DIRECTIONS:
            there = [j for j, o in enumerate(items) if j != i and direction in _lies(o, a)]
            nearly = [j for j, o in enumerate(items) if j != i and direction in _lies(o, a, margin=0.0)]
            if len(there) == 1 == len(nearly):
                slots = {"a": describe(a, size=False), "d": _PHRASE[direction]}
                found = items[there[0]]
                about = (a.combination, found.combination)
                stratum = ("relation_open", a.shape)
                yield Candidate(stratum, found.shape, (i, there[0]), slots, about)


def _relation_yes_no(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    for i, j, a, b in _pairs(scene):
        for direction in _lies(a, b):
            for asked in (direction, _opposite(direction)):
                slots = _names(a, b) | {"d": _PHRASE[asked]}
                answer = "yes" if asked == direction else "no"
                stratum = ("relation_yes_no", asked)
                yield Candidate(stratum, answer, (i, j), slots, (a.combination, b.combination))


def _comparison(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    for i, j, a, b in _pairs(scene):
        if a.size != b.size:
            first, second = rng.sample(("bigger", "smaller"), 2)
            slots = _names(a, b) | {"d": first, "e": second}
            answer = "bigger" if a.size == "large" else "smaller"
            yield Candidate(("comparison",), answer, (i, j), slots, (a.combination, b.combination))


CANDIDATES = {
    "colour": _look("colour", by="shape"),
    "shape": _look("shape", by="colour"),
    "existence": _existence,
    "counting": _counting,
    "place": _place,
    "size": _size,
    "relation_choose": _relation_choose,
    "relation_open": _relation_open,
    "relation_yes_no": _relation_yes_no,
    "comparison": _comparison,
}
