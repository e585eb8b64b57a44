"""Whether a caption of the built-in world is true: it is read, and every statement held against the scene.

The grammar is that of :func:`clipmapper.data.world.captions.draw_caption`, in any mixture of its clauses.
What does not follow it (a caption that was cut off, for example) is not understood and counts as incorrect.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from clipmapper.data.world.captions import NUMBERS, join, place_holds, plural, relation_holds
from clipmapper.data.world.scenes import COLOURS, SHAPES, SIZES, Scene, SceneObject

# What a statement is about. "object": there is such a thing (its size, colour and shape as far as named).
KINDS = ("object", "place", "relation", "count")

_SIZE, _COLOUR, _SHAPE = ("|".join(words) for words in (SIZES, COLOURS, SHAPES))
_THING = rf"(?:(?:{_SIZE}) )?(?:(?:{_COLOUR}) )?(?:{_SHAPE})"
_NUMBER = "|".join(NUMBERS[1:])
_PLURALS = {plural(shape): shape for shape in SHAPES}
_PLACES = r"(?:top|bottom)(?: left| right)?|left|right|centre"
_OPENING = re.compile(
    rf"(?:(?P<total>{_NUMBER}) (?P<noun>objects?): |(?P<only>only |just |nothing but )"
    r"|there is |an image of |you can see )?"
)
_CLAUSES = {
    "listing": re.compile(rf"a (?P<a>{_THING})"),
    "places": re.compile(rf"a (?P<a>{_THING}) (?:at|near|in) the (?P<place>{_PLACES})"),
    "relations": re.compile(
        rf"a (?P<a>{_THING}) (?:is )?(?P<how>left of|right of|above|below|next to) "
        rf"(?P<article>a|the) (?P<b>{_THING})"
    ),
    "counts": re.compile(
        rf"(?P<number>{_NUMBER}) (?P<kind>{_SHAPE}|{'|'.join(_PLURALS)}|(?:{_COLOUR}) things?)"
    ),
}


@dataclass(frozen=True)
class Statement:
    """One thing that a caption says, and whether it is so. ``kind``: one of ``KINDS``."""

    kind: str
    text: str
    holds: bool


@dataclass(frozen=True)
class CaptionTruth:
    """A caption held against its scene.

    Attributes
    ----------
    wording : one of ``WORDINGS``, "mixed", or None for a caption that was not understood.
    statements : everything that the caption says, none for a caption that was not understood.
    complete : every object of the scene is told of (named, or counted). A caption that leaves an object out
        says nothing untrue: it may be correct, and is not complete.
    """

    wording: str | None
    statements: tuple[Statement, ...]
    complete: bool

    @property
    def correct(self) -> bool:
        """It was understood, and every statement holds."""
        return self.wording is not None and all(statement.holds for statement in self.statements)


@dataclass
class Said:
    """A caption that was read: objects are mentions by number, in the order in which they are introduced.

    ``opening`` and ``clauses``: its text, in parts that a comma or "and" stands between; with each clause
    which mention is its "a", and its "b".
    """

    wording: str
    opening: re.Match
    clauses: list[tuple[re.Match, dict[str, int]]] = field(default_factory=list)
    things: list[str] = field(default_factory=list)
    places: list[tuple[int, str]] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    tallies: list[tuple[str, int]] = field(default_factory=list)
    total: int | None = None
    only: bool = False


def caption_truth(caption: str, scene: Scene) -> CaptionTruth:
    """Hold every statement of a caption against the scene.

    Every "a ..." introduces an object of its own, so "a red ring and a red ring" needs two; "the ..." is the
    first that was introduced in these words. Which object of the scene is meant by which is chosen so that as
    many as possible are what they are called, and then as many statements as possible hold.

    Places and relations are those of :mod:`clipmapper.data.world.captions`: the third of the image or what is
    at its border (:func:`place_holds`), and for directions the axis that they are about
    (:func:`relation_holds`). A list behind "three objects:" claims to be the whole: one that does not add up
    to three is a count that does not hold, as is a total that is not the scene's.
    """
    said = read_caption(caption)
    if said is None:
        return CaptionTruth(None, (), False)
    counts = tuple(_counted(said, scene.objects))
    _, best = best_meaning(said, scene.objects)
    told = sum(number for _, number in said.tallies) + len(said.things)
    correct = all(statement.holds for statement in best + counts)
    return CaptionTruth(said.wording, best + counts, correct and told == len(scene.objects))


def best_meaning(
    said: Said, items: Sequence[SceneObject]
) -> tuple[list[SceneObject | None], tuple[Statement, ...]]:
    """Which object each mention means, and what then holds; of several that agree equally well the first."""
    best: tuple[list[SceneObject | None], tuple[Statement, ...]] = ([], ())
    for chosen in _meanings(len(said.things), items):
        judged = tuple(_judged(said, chosen))
        if not best[1] or _agreement(judged) > _agreement(best[1]):
            best = chosen, judged
        if all(statement.holds for statement in best[1]):
            break
    return best


def read_caption(caption: str) -> Said | None:
    """What a caption says; None for one that does not follow the grammar."""
    caption = " ".join(re.sub(r"\s+([,:])", r"\1", caption).split())
    opening = _OPENING.match(caption)
    rest = caption[opening.end() :]
    parts = re.split(r", | and ", rest)
    if rest != join(parts):
        return None
    said = Said("", opening, only=opening["only"] is not None)
    if opening["total"]:
        said.total = NUMBERS.index(opening["total"])
        if (opening["noun"] == "object") != (said.total == 1):
            return None
    wordings = set()
    for part in parts:
        read = [(name, clause) for name, form in _CLAUSES.items() if (clause := form.fullmatch(part))]
        if not read or not _add(said, *read[0]):
            return None
        wordings.add(read[0][0])
    if wordings == {"listing"} and said.total:
        wordings = {"counts"}
    if said.only:  # the way in which the place of a lone object is told among relations
        wordings = {"relations"} if wordings == {"places"} else wordings
    said.wording = wordings.pop() if len(wordings) == 1 else "mixed"
    return said


def _add(said: Said, wording: str, clause: re.Match) -> bool:
    """Take a clause up; False when it makes no sense."""
    mentioned: dict[str, int] = {}
    said.clauses.append((clause, mentioned))
    if wording == "counts":
        number, kind = NUMBERS.index(clause["number"]), clause["kind"]
        if (kind in _PLURALS or kind.endswith("things")) != (number > 1):
            return False
        word = _PLURALS.get(kind, kind.split()[0])
        # The same kind twice, or shapes beside colours, is no way to count.
        if any(word == other or (word in SHAPES) != (other in SHAPES) for other, _ in said.tallies):
            return False
        said.tallies.append((word, number))
        return True
    before = list(said.things)
    said.things.append(clause["a"])
    mentioned["a"] = len(before)
    if wording == "places":
        said.places.append((len(before), clause["place"]))
    if wording == "relations":
        if clause["article"] == "the":
            if clause["b"] not in before:
                return False
            other = before.index(clause["b"])
        else:
            other = len(said.things)
            said.things.append(clause["b"])
        mentioned["b"] = other
        said.relations.append((len(before), clause["how"], other))
    return True


def _meanings(things: int, items: Sequence[SceneObject]) -> Iterator[list[SceneObject | None]]:
    """Every way to mean an object of the scene by each thing, no object twice; None: there is none."""

    def extend(chosen: list[SceneObject | None], left: Sequence[SceneObject]) -> Iterator[list]:
        if len(chosen) == things:
            yield chosen
            return
        for position, item in enumerate(left):
            yield from extend([*chosen, item], [*left[:position], *left[position + 1 :]])
        # Only as many may be missing as there are too few objects for: all others can be meant.
        if things - len(chosen) > len(left):
            yield from extend([*chosen, None], left)

    return extend([], list(items))


def _agreement(statements: Sequence[Statement]) -> tuple[int, int]:
    return sum(s.holds for s in statements if s.kind == "object"), sum(s.holds for s in statements)


def _judged(said: Said, chosen: Sequence[SceneObject | None]) -> Iterator[Statement]:
    for name, item in zip(said.things, chosen, strict=True):
        yield Statement("object", f"a {name}", item is not None and fits(name, item))
    for thing, place in said.places:
        item = chosen[thing]
        holds = item is not None and place_holds(item, place)
        yield Statement("place", f"{said.things[thing]} at the {place}", holds)
    for one, how, other in said.relations:
        a, b = chosen[one], chosen[other]
        holds = a is not None and b is not None and relation_holds(a, how, b)
        yield Statement("relation", f"{said.things[one]} {how} {said.things[other]}", holds)


def _counted(said: Said, items: Sequence[SceneObject]) -> Iterator[Statement]:
    told = sum(number for _, number in said.tallies) + len(said.things)
    if said.total is not None:
        yield Statement("count", f"{said.total} in all", said.total == len(items))
        yield Statement("count", f"a list of {said.total}", told == said.total)
    if said.only:
        yield Statement("count", "only this", told == len(items))
    for word, number in said.tallies:
        found = sum(word in (item.shape, item.colour) for item in items)
        yield Statement("count", f"{number} × {word}", found == number)


def fits(name: str, item: SceneObject) -> bool:
    """Whether an object is what it is called."""
    return all(word in (item.size, item.colour, item.shape) for word in name.split())
