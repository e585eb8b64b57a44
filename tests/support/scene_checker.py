"""Reads questions and captions of the built-in world from their text alone and judges them by the objects.

Written from the English, not from the code that makes the texts, and shares nothing with it: a text that
is not understood is an error. Objects are anything with ``shape, colour, size, x, y, radius``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("ring", "square", "triangle", "cross")
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "above", "below")
SIDE = 72  # pixels
CLEARLY = 10.0  # pixels between two centres from which people agree on left, right, above and below

_SIZE, _COLOUR, _SHAPE = ("(?:" + "|".join(words) + ")" for words in (SIZES, COLOURS, SHAPES))
_PLURALS = {"rings": "ring", "squares": "square", "triangles": "triangle", "crosses": "cross"}
_THING = f"(?:{_SIZE} )?(?:{_COLOUR} )?{_SHAPE}"
_DIRECTION = "left of|right of|above|below"
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}

# a, b: things; d, e: directions or comparisons.
_A, _B = f"(?P<a>{_THING})", f"(?P<b>{_THING})"
_D = f"(?P<d>{_DIRECTION})"
_D_OR_E = f"{_D} or (?P<e>{_DIRECTION})"
_BIGGER_OR_SMALLER = "(?P<d>bigger|smaller) or (?P<e>bigger|smaller)"
_LARGE_OR_SMALL = f"(?P<d>{_SIZE}) or (?P<e>{_SIZE})"
_COLOURLESS = f"(?P<a>(?:{_SIZE} )?{_SHAPE})"
_SHAPELESS = f"(?P<a>(?:{_SIZE} )?{_COLOUR})"
_MANY = f"(?P<a>{'|'.join(_PLURALS)}|{_COLOUR} things)"

_QUESTIONS = {
    "colour": (
        rf"what colou?r is the {_COLOURLESS}\?",
        rf"what is the colour of the {_COLOURLESS}\?",
        rf"which colour does the {_COLOURLESS} have\?",
    ),
    "shape": (
        rf"what shape is the {_SHAPELESS} thing\?",
        rf"what is the shape of the {_SHAPELESS} object\?",
        rf"which shape does the {_SHAPELESS} thing have\?",
        rf"what kind of shape is the {_SHAPELESS} object\?",
    ),
    "existence": (
        rf"is there a {_A}\?",
        rf"can you see a {_A}\?",
        rf"does the image show a {_A}\?",
        rf"is a {_A} in the image\?",
    ),
    "counting": (
        rf"how many {_MANY} (?:are there|can you see)\?",
        rf"how many {_MANY} does the image show\?",
        rf"count the {_MANY}: how many\?",
    ),
    "place": (
        rf"is the {_A} {_D_OR_E} the middle\?",
        rf"where is the {_A}: {_D_OR_E} the middle\?",
        rf"does the {_A} lie {_D_OR_E} the middle\?",
    ),
    "size": (
        rf"is the {_A} {_LARGE_OR_SMALL}\?",
        rf"is it a (?P<d>{_SIZE}) or a (?P<e>{_SIZE}) {_A}\?",
        rf"does the {_A} look {_LARGE_OR_SMALL}\?",
    ),
    "relation_choose": (
        rf"is the {_A} {_D_OR_E} the {_B}\?",
        rf"where is the {_A}: {_D_OR_E} the {_B}\?",
        rf"does the {_A} lie {_D_OR_E} the {_B}\?",
    ),
    "relation_open": (rf"(?:what|which shape|what shape do you see) (?:is )?{_D} the {_A}\?",),
    "relation_yes_no": (
        rf"is the {_A} {_D} the {_B}\?",
        rf"is it true that the {_A} is {_D} the {_B}\?",
        rf"does the {_A} lie {_D} the {_B}\?",
    ),
    "comparison": (
        rf"is the {_A} {_BIGGER_OR_SMALLER} than the {_B}\?",
        rf"which is it, the {_A} {_BIGGER_OR_SMALLER} than the {_B}\?",
        rf"does the {_A} look {_BIGGER_OR_SMALLER} than the {_B}\?",
    ),
}


@dataclass(frozen=True)
class _Point:
    x: float
    y: float


class Unclear(Exception):
    """The question takes for granted what is not so, or people would disagree about its answer."""


@dataclass(frozen=True)
class Reading:
    family: str
    phrasing: str  # the text with its things and directions blanked
    parts: dict[str, str]


def read(text: str) -> Reading:
    """Read what a question asks. Exactly one reading is possible, otherwise ValueError."""
    found = []
    for family, patterns in _QUESTIONS.items():
        for pattern in patterns:
            if match := re.fullmatch(pattern, text):
                blanked = text
                for group in sorted(match.groupdict(), key=match.start, reverse=True):
                    blanked = blanked[: match.start(group)] + group.upper() + blanked[match.end(group) :]
                found.append(Reading(family, blanked, match.groupdict()))
    if len(found) != 1:
        raise ValueError(f"{len(found)} readings of {text!r}")
    return found[0]


def fits(description: str, item) -> bool:
    """Whether an object is, for example, a "small red ring", a "red thing", or one of the "crosses"."""
    for word in description.split():
        word = _PLURALS.get(word, word)
        if word not in (item.size, item.colour, item.shape, "thing", "things"):
            return False
    return True


def answer(text: str, items: Sequence) -> str:
    """The answer, from the objects alone. Raises Unclear where there is none to give."""
    asked = read(text)
    return _SOLVERS[asked.family](asked.parts, items)


def combinations(text: str, items: Sequence) -> set[tuple[str, str]]:
    """Every colour–shape pair that a question and its answer are about."""
    asked = read(text)
    named = [asked.parts[part] for part in ("a", "b") if part in asked.parts]
    about = {(o.colour, o.shape) for name in named for o in items if fits(name, o)}
    if asked.family == "existence":
        colour, shape = asked.parts["a"].split()[-2:]
        about.add((colour, shape))
    if asked.family == "relation_open":
        start = _the(asked.parts["a"], items)
        about |= {(o.colour, o.shape) for o in items if _beyond(asked.parts["d"], o, start) > 0}
    return about


def is_hard_negative(text: str, items: Sequence) -> bool:
    """The colour asked for is there, and the shape is, but not together."""
    colour, shape = read(text).parts["a"].split()[-2:]
    together = any((o.colour, o.shape) == (colour, shape) for o in items)
    return not together and any(o.colour == colour for o in items) and any(o.shape == shape for o in items)


def _the(description: str, items: Sequence):
    fitting = [o for o in items if fits(description, o)]
    if len(fitting) != 1:
        raise Unclear(f"{len(fitting)} objects are a {description}")
    return fitting[0]


def _beyond(direction: str, a, b) -> float:
    """How far ``a`` lies in a direction as seen from ``b``, in pixels (y grows downwards)."""
    word = direction.split()[0]
    return {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[word]


def _colour(parts, items) -> str:
    return _the(parts["a"], items).colour


def _shape(parts, items) -> str:
    return _the(parts["a"], items).shape


def _existence(parts, items) -> str:
    return "yes" if any(fits(parts["a"], o) for o in items) else "no"


def _counting(parts, items) -> str:
    return str(sum(fits(parts["a"], o) for o in items))


def _place(parts, items) -> str:
    return _choice(parts, _the(parts["a"], items), _Point(SIDE / 2, SIDE / 2))


def _size(parts, items) -> str:
    if {parts["d"], parts["e"]} != set(SIZES):
        raise Unclear("these two are no choice")
    return _the(parts["a"], items).size


def _relation_choose(parts, items) -> str:
    return _choice(parts, _the(parts["a"], items), _the(parts["b"], items))


def _choice(parts, a, b) -> str:
    if {parts["d"], parts["e"]} not in ({"left of", "right of"}, {"above", "below"}):
        raise Unclear("these two are no choice")
    holds = [d for d in (parts["d"], parts["e"]) if _beyond(d, a, b) >= CLEARLY]
    if not holds:
        raise Unclear("too close to say")
    return holds[0].split()[0]


def _relation_yes_no(parts, items) -> str:
    distance = _beyond(parts["d"], _the(parts["a"], items), _the(parts["b"], items))
    if abs(distance) < CLEARLY:
        raise Unclear("too close to say")
    return "yes" if distance > 0 else "no"


def _relation_open(parts, items) -> str:
    start = _the(parts["a"], items)
    there = [o for o in items if _beyond(parts["d"], o, start) > 0]
    if len(there) != 1 or _beyond(parts["d"], there[0], start) < CLEARLY:
        raise Unclear(f"{len(there)} objects there, or too close to say")
    return there[0].shape


def _comparison(parts, items) -> str:
    a, b = _the(parts["a"], items), _the(parts["b"], items)
    if {parts["d"], parts["e"]} != {"bigger", "smaller"}:
        raise Unclear("these two are no choice")
    if max(a.radius, b.radius) < 1.25 * min(a.radius, b.radius):
        raise Unclear("about the same size")
    return "bigger" if a.radius > b.radius else "smaller"


_SOLVERS = {
    "colour": _colour,
    "shape": _shape,
    "existence": _existence,
    "counting": _counting,
    "place": _place,
    "size": _size,
    "relation_choose": _relation_choose,
    "relation_open": _relation_open,
    "relation_yes_no": _relation_yes_no,
    "comparison": _comparison,
}

_OPENING = re.compile(
    r"(?P<total>one object|(?:two|three|four) objects): |(?P<only>only|just|nothing but) "
    r"|there is |an image of |you can see |"
)
_PLACE = "(?:top|bottom)(?: left| right)?|left|right|centre"
_CLAUSES = {
    "thing": rf"a {_A}",
    "place": rf"a {_A} (?:at|near|in) the (?P<place>{_PLACE})",
    "relation": rf"a {_A} (?:is )?(?P<how>{_DIRECTION}|next to) (?P<article>a|the) {_B}",
    "tally": rf"(?P<number>one|two|three|four) (?P<a>{_SHAPE}|{'|'.join(_PLURALS)}|{_COLOUR} things?)",
}


def caption_is_true(caption: str, items: Sequence) -> bool:
    """Whether every statement of a caption holds, each "a ..." being another object.

    A caption in a wording that is not known raises ValueError.
    """
    opening = _OPENING.match(caption)
    total = opening["total"] and _NUMBERS[opening["total"].split()[0]]
    if (total and total != len(items)) or (opening["only"] and len(items) != 1):
        return False
    mentioned: list[str] = []  # by "a ..."
    places: dict[int, str] = {}  # of which mention
    relations: list[tuple[int, str, int | str]] = []  # mention, how, mention or "the ..."
    for part in re.split(r", | and ", caption[opening.end() :]):
        kind, said = _clause(part)
        if kind == "tally":
            plural = "things" in said["a"] or said["a"] in _PLURALS
            if plural != (said["number"] != "one"):
                raise ValueError(f"not English: {part!r}")
            if sum(fits(said["a"], o) for o in items) != _NUMBERS[said["number"]]:
                return False
            continue
        mentioned.append(said["a"])
        if kind == "place":
            places[len(mentioned) - 1] = said["place"]
        if kind == "relation":
            first = len(mentioned) - 1
            if said["article"] == "a":
                mentioned.append(said["b"])
                relations.append((first, said["how"], first + 1))
            else:
                if said["b"] not in mentioned:
                    raise ValueError(f"'the {said['b']}' was not mentioned before in {caption!r}")
                relations.append((first, said["how"], mentioned.index(said["b"])))
    if total and mentioned and len(mentioned) != total:
        return False
    return any(
        all(fits(name, o) for name, o in zip(mentioned, chosen, strict=True))
        and all(_in_place(chosen[k], place) for k, place in places.items())
        and all(_related(chosen[i], how, chosen[j]) for i, how, j in relations)
        for chosen in permutations(items, len(mentioned))
    )


def _clause(part: str) -> tuple[str, dict[str, str]]:
    for kind, pattern in _CLAUSES.items():
        if match := re.fullmatch(pattern, part):
            return kind, match.groupdict()
    raise ValueError(f"not understood: {part!r}")


def _in_place(item, place: str) -> bool:
    """A place is a third of the image each way, give or take 2 pixels; the middle third has no name."""
    low, high = SIDE / 3, 2 * SIDE / 3
    thirds = {"first": (-1e9, low + 2), "middle": (low - 2, high + 2), "last": (high - 2, 1e9)}
    words = set(place.split()) - {"centre"}

    def fits_along(at: float, first: str, last: str) -> bool:
        start, end = thirds["first" if first in words else "last" if last in words else "middle"]
        return start <= at < end or at == end  # on the border's edge both are right

    return fits_along(item.x, "left", "right") and fits_along(item.y, "top", "bottom")


def _related(a, how: str, b) -> bool:
    if how == "next to":
        return max(abs(a.x - b.x), abs(a.y - b.y)) < CLEARLY
    return _beyond(how, a, b) >= CLEARLY
