"""Captions of built-in scenes: every statement in them is true of the scene.

Used to pretrain the shipped CLIP, and to train and judge captioners.
"""

import random
from collections.abc import Sequence

from clipmapper.data.scenes import IMAGE_SIZE, Scene, SceneObject

# A relation is stated only when the centres are at least this far apart along its axis: closer than that
# people disagree about it.
RELATION_MARGIN = 10.0  # pixels
NUMBERS = ("no", "one", "two", "three", "four")


def describe(item: SceneObject, *, size: bool = True, colour: bool = True) -> str:
    """For example "small red ring", without what is not asked for."""
    return " ".join([item.size] * size + [item.colour] * colour + [item.shape])


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def place_name(item: SceneObject) -> str:
    """The third of the image in which the object's centre lies, both ways: "top left", "left", "centre"."""
    third = IMAGE_SIZE / 3
    row = ("top", "", "bottom")[min(int(item.y // third), 2)]
    column = ("left", "", "right")[min(int(item.x // third), 2)]
    return f"{row} {column}".strip() or "centre"


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """How ``a`` lies to ``b`` along the axis on which they are further apart; None when too close to say."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < RELATION_MARGIN:
        return None
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def draw_caption(scene: Scene, rng: random.Random) -> str:
    """One caption in a wording drawn at random: objects in any order, places, relations, sizes, counts."""
    items = list(scene.objects)
    rng.shuffle(items)
    wording = rng.choice((_places, _places, _relations, _relations, _listing, _counts, _counts))
    return wording(items, rng)


def captions(scene: Scene, count: int = 5) -> list[str]:
    """``count`` differently worded captions, the same ones for the same scene."""
    rng = random.Random("captions/" + scene.key)
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(draw_caption(scene, rng))
    return list(found)


def join(phrases: Sequence[str]) -> str:
    """For example "a ring, a cross and a square"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _article(phrase: str) -> str:
    return f"a {phrase}"


def _listing(items: Sequence[SceneObject], rng: random.Random) -> str:
    opening = rng.choice(("", "there is ", "an image of ", "you can see "))
    return opening + join([_article(describe(o)) for o in items])


def _places(items: Sequence[SceneObject], rng: random.Random) -> str:
    size = rng.random() < 0.7
    where = rng.choice(("at the", "near the", "in the"))
    return join([f"{_article(describe(o, size=size))} {where} {place_name(o)}" for o in items])


def _relations(items: Sequence[SceneObject], rng: random.Random) -> str:
    """Each object to the one before it; a pair too close to say is told side by side."""
    if len(items) == 1:
        opening = rng.choice(("only", "just", "nothing but"))
        return f"{opening} {_article(describe(items[0]))} at the {place_name(items[0])}"
    size = rng.random() < 0.5
    pairs = list(zip(items[::2], items[1::2], strict=False))
    verb = rng.choice(("", "is "))
    told = []
    for a, b in pairs:
        how = relation(a, b) or "next to"
        told.append(f"{_article(describe(a, size=size))} {verb}{how} {_article(describe(b, size=size))}")
    if len(items) % 2:
        last, other = items[-1], items[0]
        how = relation(last, other) or "next to"
        told.append(f"{_article(describe(last, size=size))} {verb}{how} the {describe(other, size=size)}")
    return join(told)


def _counts(items: Sequence[SceneObject], rng: random.Random) -> str:
    opening = f"{NUMBERS[len(items)]} {'objects' if len(items) > 1 else 'object'}"
    if rng.random() < 0.25:
        return f"{opening}: {join([_article(describe(o)) for o in items])}"
    by_kind = rng.choice(("shape", "colour"))
    tally: dict[str, int] = {}
    for o in items:
        tally[getattr(o, by_kind)] = tally.get(getattr(o, by_kind), 0) + 1
    if by_kind == "shape":
        told = [f"{NUMBERS[n]} {plural(kind) if n > 1 else kind}" for kind, n in tally.items()]
    else:
        told = [f"{NUMBERS[n]} {kind} {'things' if n > 1 else 'thing'}" for kind, n in tally.items()]
    return f"{opening}: {join(told)}"
