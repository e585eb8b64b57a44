"""Captions of built-in scenes: every statement in them is true of the scene.

Used to pretrain the shipped CLIP, and to train and judge captioners. Every word knows which objects it speaks
of, so that an explanation of the word can be held against them.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipmapper.data.world.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene, SceneObject

# A relation is stated only when the centres are at least this far apart along its axis: closer than that
# people disagree about it.
RELATION_MARGIN = 10.0  # pixels
# Within so much of a border between two places an object may be called by either. An object is 12 pixels wide
# or more, and nobody sees on which side of such a border its centre is.
PLACE_MARGIN = 2.0  # pixels
NUMBERS = ("no", "one", "two", "three", "four")
# Ways to describe a scene.
WORDINGS = ("listing", "places", "relations", "counts")
# What a word can say of objects. Other words ("a", "is", "there", commas) speak of none.
WORD_KINDS = ("colour", "shape", "size", "relation", "place", "number")


@dataclass(frozen=True)
class CaptionWord:
    """A word (or a comma, a colon) of a caption: its kind (one of ``WORD_KINDS``, or None), and which objects
    of the scene it speaks of, by their position in it."""

    text: str
    kind: str | None = None
    objects: tuple[int, ...] = ()


@dataclass(frozen=True)
class AlignedCaption:
    """A caption whose words know what they speak of."""

    words: tuple[CaptionWord, ...]

    @property
    def text(self) -> str:
        told = ""
        for word in self.words:
            told += word.text if word.text in ",:" or not told else f" {word.text}"
        return told


def caption_words() -> tuple[str, ...]:
    """Every word that a caption can have, the rare ones too, with the comma and the colon."""
    told = "a an the and is there you can see image of only just nothing but at near in , :"
    counted = "object objects thing things"
    looks = (*COLOURS, *SIZES, *SHAPES, *map(plural, SHAPES), *NUMBERS[1:])
    return tuple(dict.fromkeys((*told.split(), *where_words(), "to", "of", *counted.split(), *looks)))


def where_words() -> tuple[str, ...]:
    """The words for places and for directions."""
    return ("top", "bottom", "left", "right", "centre", "above", "below", "next")


def describe(item: SceneObject, *, size: bool = True, colour: bool = True) -> str:
    """For example "small red ring", without what is not asked for."""
    return " ".join([item.size] * size + [item.colour] * colour + [item.shape])


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def place_name(item: SceneObject) -> str:
    """The third of the image in which the object's centre lies, both ways: "top left", "left", "centre"."""
    return _place_at(item.x, item.y)


def place_holds(item: SceneObject, place: str) -> bool:
    """Whether the object may be said to be there: its centre is, or is within ``PLACE_MARGIN`` of it."""
    beside = (-PLACE_MARGIN, 0.0, PLACE_MARGIN)
    return any(_place_at(item.x + right, item.y + down) == place for right in beside for down in beside)


def _place_at(x: float, y: float) -> str:
    across, along = (min(max(int(3 * at // IMAGE_SIZE), 0), 2) for at in (x, y))
    return " ".join([("top", "", "bottom")[along], ("left", "", "right")[across]]).strip() or "centre"


def relation(a: SceneObject, b: SceneObject) -> str:
    """Say how ``a`` lies to ``b``: the direction in which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < RELATION_MARGIN:
        return "next to"
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def relation_holds(a: SceneObject, how: str, b: SceneObject) -> bool:
    """Whether it is true that ``a`` is, for example, "left of" ``b``.

    Each direction is about its own axis alone, as it is for questions about relations: what is below and to
    the left of a ring is below it, and is left of it. "next to": too close to say, both ways.
    """
    right, down = a.x - b.x, a.y - b.y
    along = {"left of": -right, "right of": right, "above": -down, "below": down}
    return relation(a, b) == how if how == "next to" else along[how] >= RELATION_MARGIN


def draw_aligned_caption(
    scene: Scene,
    rng: random.Random,
    shares: Mapping[str, float] | None = None,
    left_to_right: bool = False,
) -> AlignedCaption:
    """One caption in a wording drawn at random: objects in any order, places, relations, sizes, counts.

    ``shares``: how often each of ``WORDINGS`` is drawn, relative to the others. ``left_to_right``: objects
    are spoken of in this order, and not in any.
    """
    items = list(enumerate(scene.objects))
    rng.shuffle(items)
    if left_to_right:
        items.sort(key=lambda item: item[1].x)
    if shares is None:
        wording = rng.choice((_places, _places, _relations, _relations, _listing, _counts, _counts))
    else:
        (name,) = rng.choices([*shares], [*shares.values()])
        wording = {"listing": _listing, "places": _places, "relations": _relations, "counts": _counts}[name]
    return AlignedCaption(tuple(wording(items, rng)))


def draw_caption(
    scene: Scene,
    rng: random.Random,
    shares: Mapping[str, float] | None = None,
    left_to_right: bool = False,
) -> str:
    """The text of :func:`draw_aligned_caption`."""
    return draw_aligned_caption(scene, rng, shares, left_to_right).text


def aligned_captions(scene: Scene, count: int = 5) -> list[AlignedCaption]:
    """``count`` differently worded captions, the same ones for the same scene."""
    rng = random.Random("captions/" + scene.key)
    found: dict[str, AlignedCaption] = {}
    while len(found) < count:
        caption = draw_aligned_caption(scene, rng)
        found.setdefault(caption.text, caption)
    return list(found.values())


def captions(scene: Scene, count: int = 5) -> list[str]:
    """The texts of :func:`aligned_captions`."""
    return [caption.text for caption in aligned_captions(scene, count)]


def join(phrases: Sequence[str]) -> str:
    """For example "a ring, a cross and a square"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


_Words = list[CaptionWord]
_Item = tuple[int, SceneObject]  # with its position in the scene


def _plain(text: str) -> _Words:
    return [CaptionWord(word) for word in text.split()]


def _about(text: str, kind: str, *objects: int) -> _Words:
    return [CaptionWord(word, kind, objects) for word in text.split()]


def _thing(item: _Item, article: str = "a", *, size: bool = True) -> _Words:
    """For example "a small red ring"."""
    number, o = item
    said = [*_about(o.size, "size", number)] * size
    return [*_plain(article), *said, *_about(o.colour, "colour", number), *_about(o.shape, "shape", number)]


def _place(item: _Item, where: str) -> _Words:
    number, o = item
    return [*_plain(where), *_about(place_name(o), "place", number)]


def _join(phrases: Sequence[_Words]) -> _Words:
    joined = list(phrases[0])
    for phrase in phrases[1:-1]:
        joined += [CaptionWord(","), *phrase]
    return joined if len(phrases) == 1 else [*joined, CaptionWord("and"), *phrases[-1]]


def _listing(items: Sequence[_Item], rng: random.Random) -> _Words:
    opening = rng.choice(("", "there is", "an image of", "you can see"))
    return [*_plain(opening), *_join([_thing(item) for item in items])]


def _places(items: Sequence[_Item], rng: random.Random) -> _Words:
    size = rng.random() < 0.7
    where = rng.choice(("at the", "near the", "in the"))
    return _join([[*_thing(item, size=size), *_place(item, where)] for item in items])


def _relations(items: Sequence[_Item], rng: random.Random) -> _Words:
    """Each object to the one before it; a pair too close to say is told side by side."""
    if len(items) == 1:
        opening = rng.choice(("only", "just", "nothing but"))
        return [*_plain(opening), *_thing(items[0]), *_place(items[0], "at the")]
    size = rng.random() < 0.5
    pairs = list(zip(items[::2], items[1::2], strict=False))
    verb = rng.choice(("", "is"))
    told = []
    for a, b in pairs:
        told.append([*_related(a, b, verb, size), *_thing(b, size=size)])
    if len(items) % 2:
        last, other = items[-1], items[0]
        told.append([*_related(last, other, verb, size), *_thing(other, "the", size=size)])
    return _join(told)


def _related(a: _Item, b: _Item, verb: str, size: bool) -> _Words:
    """All but the second thing: "a red ring is left of"."""
    how = relation(a[1], b[1])
    return [*_thing(a, size=size), *_plain(verb), *_about(how, "relation", a[0], b[0])]


def _counts(items: Sequence[_Item], rng: random.Random) -> _Words:
    everything = tuple(number for number, _ in items)
    opening = [
        *_about(NUMBERS[len(items)], "number", *everything),
        *_plain("objects" if len(items) > 1 else "object"),
        CaptionWord(":"),
    ]
    if rng.random() < 0.25:
        return [*opening, *_join([_thing(item) for item in items])]
    by_kind = rng.choice(("shape", "colour"))
    alike: dict[str, list[int]] = {}
    for number, o in items:
        alike.setdefault(getattr(o, by_kind), []).append(number)
    told = []
    for kind, numbers in alike.items():
        several = len(numbers) > 1
        if by_kind == "shape":
            name = _about(plural(kind) if several else kind, "shape", *numbers)
        else:
            name = [*_about(kind, "colour", *numbers), *_plain("things" if several else "thing")]
        told.append([*_about(NUMBERS[len(numbers)], "number", *numbers), *name])
    return [*opening, *_join(told)]
