"""Questions about built-in scenes, each with its answer and what decides it.

Answers are balanced inside every *stratum* (a family, and what its wording gives away, such as the shape
that is asked for), so that the words of a question say next to nothing about its answer.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from clipmapper.data.scene_captions import RELATION_MARGIN, describe, plural
from clipmapper.data.scenes import COLOURS, HELD_OUT, IMAGE_SIZE, MAX_OBJECTS, SHAPES, Scene, SceneObject

# Chance of a guess that knows the question's wording, in percent of questions: 1 / number of its answers.
CHANCE = {
    "colour": 1 / 6,
    "shape": 1 / 4,
    "existence": 1 / 2,
    "counting": 1 / 4,
    "place": 1 / 2,
    "relation_choose": 1 / 2,
    "relation_open": 1 / 4,
    "relation_yes_no": 1 / 2,
    "comparison": 1 / 2,
}
FAMILIES = tuple(CHANCE)
_DIRECTIONS = ("left", "right", "above", "below")
ANSWERS = (*COLOURS, *SHAPES, "yes", "no", "0", "1", "2", "3", *_DIRECTIONS, "bigger", "smaller")

# Kinds of question in a family and their shares. A hard negative: the colour is there and the shape is there,
# but not together.
_SHARES = {"existence": {"yes": 0.5, "hard no": 0.25, "easy no": 0.25}}

# How far the most frequent answer of a stratum may run ahead of the rarest while questions are chosen.
_SLACK = 2

_TEMPLATES = {
    "colour": (
        "what colour is the {a}?",
        "what is the colour of the {a}?",
        "which colour does the {a} have?",
        "what color is the {a}?",
    ),
    "shape": (
        "what shape is the {a} thing?",
        "what is the shape of the {a} object?",
        "which shape does the {a} thing have?",
        "what kind of shape is the {a} object?",
    ),
    "existence": (
        "is there a {a}?",
        "can you see a {a}?",
        "does the image show a {a}?",
        "is a {a} in the image?",
    ),
    "counting": (
        "how many {a} are there?",
        "how many {a} can you see?",
        "how many {a} does the image show?",
        "count the {a}: how many?",
    ),
    "place": (
        "is the {a} {d} or {e} the middle?",
        "where is the {a}: {d} or {e} the middle?",
        "does the {a} lie {d} or {e} the middle?",
    ),
    "relation_choose": (
        "is the {a} {d} or {e} the {b}?",
        "where is the {a}: {d} or {e} the {b}?",
        "does the {a} lie {d} or {e} the {b}?",
    ),
    "relation_open": (
        "what is {d} the {a}?",
        "which shape is {d} the {a}?",
        "what shape do you see {d} the {a}?",
    ),
    "relation_yes_no": (
        "is the {a} {d} the {b}?",
        "is it true that the {a} is {d} the {b}?",
        "does the {a} lie {d} the {b}?",
    ),
    "comparison": (
        "is the {a} {d} or {e} than the {b}?",
        "which is it, the {a} {d} or {e} than the {b}?",
        "does the {a} look {d} or {e} than the {b}?",
    ),
}
# The word of a template that asks: change it and the answer changes.
_ASKING = {
    "colour": ("colour", "color"),
    "shape": ("shape",),
    "existence": (),
    "counting": ("many",),
    "place": _DIRECTIONS,
    "relation_choose": _DIRECTIONS,
    "relation_open": _DIRECTIONS,
    "relation_yes_no": _DIRECTIONS,
    "comparison": ("bigger", "smaller"),
}
_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class SceneQuestion:
    """A question, its answer, and the truth about what decides it.

    ``deciding_objects``: positions in ``scene.objects`` of those whose pixels decide the answer (for "no"
    and "0": the objects that share a property with what is asked for, or all of them where none does).
    ``deciding_words``: the words whose change would change what is asked.
    """

    family: str
    text: str
    answer: str
    deciding_objects: tuple[int, ...]
    deciding_words: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    stratum: tuple[str, ...]
    answer: str
    objects: tuple[int, ...]
    slots: dict[str, str]
    combinations: tuple[tuple[str, str], ...]  # colour–shape pairs that the question is about
    kind: str = ""  # of the questions of a family, one that is to have its share; see _SHARES


def balanced_questions(
    scenes: Iterable[Scene],
    seed: int,
    *,
    families: Sequence[str] = FAMILIES,
    per_family: int = 1,
    held_out: bool = False,
    most: int = MAX_OBJECTS,
) -> Iterator[list[SceneQuestion]]:
    """For each scene at most ``per_family`` questions of every family, balanced over the scenes.

    Of the answers (and before them the kinds) that a scene can give, the one that was asked for least is
    taken; where that one already runs ahead of others which this scene cannot give, no question of the family
    is asked. With ``held_out`` only questions about colour–shape combinations that training never sees are
    asked, otherwise only questions that mention none. ``most``: how many objects a scene has at most; what it
    cannot count to is no answer to balance with.
    """
    rng = random.Random(f"questions/{seed}/{held_out}")
    balance = _Balance(held_out, most)
    for scene in scenes:
        asked = []
        for family in families:
            options = [c for c in _CANDIDATES[family](scene, rng) if _about_held_out(c) == held_out]
            rng.shuffle(options)
            for _ in range(per_family):
                option = balance.take(family, options)
                if option is None:
                    break
                options.remove(option)
                asked.append(_word(family, option, rng))
        yield asked


class _Balance:
    """How often every answer of a stratum, and every kind of a family, was asked for."""

    def __init__(self, held_out: bool, most: int) -> None:
        self.held_out, self.most = held_out, most
        self.answers: dict[tuple[str, ...], Counter] = defaultdict(Counter)
        self.kinds: dict[str, Counter] = defaultdict(Counter)

    def take(self, family: str, options: Sequence[_Candidate]) -> _Candidate | None:
        """The option that was asked for least, counted; None if all of them run ahead."""
        shares = _SHARES.get(family, {"": 1.0})
        ahead = {kind: self.kinds[family][kind] / share for kind, share in shares.items()}
        least_kind = min(ahead.values())
        for option in sorted(options, key=lambda c: (ahead[c.kind], self.answers[c.stratum][c.answer])):
            counts = self.answers[option.stratum]
            least = min(counts[a] for a in self._possible(family, option.stratum))
            if (
                counts[option.answer] <= least + _SLACK
                and ahead[option.kind] <= least_kind + _SLACK / shares[option.kind]
            ):
                counts[option.answer] += 1
                self.kinds[family][option.kind] += 1
                return option
        return None

    def _possible(self, family: str, stratum: tuple[str, ...]) -> tuple[str, ...]:
        if family == "colour":
            return tuple(c for c in COLOURS if ((c, stratum[1]) in HELD_OUT) == self.held_out)
        if family == "shape":
            return tuple(s for s in SHAPES if ((stratum[1], s) in HELD_OUT) == self.held_out)
        if family == "existence":
            return ("yes", "no")
        if family == "counting":
            # Nothing that is counted as 0 has a combination, so held-out questions start at 1.
            return ("0", "1", "2", "3")[self.held_out : self.most + 1]
        if family in ("place", "relation_choose"):
            return ("left", "right") if stratum[1] == "across" else ("above", "below")
        if family == "relation_open":
            return SHAPES
        if family == "relation_yes_no":
            return ("yes", "no")
        return ("bigger", "smaller")


def draw_presupposition(scene: Scene, rng: random.Random) -> str:
    """A question that takes this scene for granted, without its answer (text for contrastive training)."""
    families = list(FAMILIES)
    rng.shuffle(families)
    for family in families:
        options = [c for c in _CANDIDATES[family](scene, rng) if c.answer not in ("no", "0")]
        if options:
            return _word(family, rng.choice(options), rng).text
    return f"is there a {scene.objects[0].shape}?"


def _about_held_out(candidate: _Candidate) -> bool:
    return any(combination in HELD_OUT for combination in candidate.combinations)


def _word(family: str, candidate: _Candidate, rng: random.Random) -> SceneQuestion:
    text = rng.choice(_TEMPLATES[family]).format(**candidate.slots)
    words = set(text.replace("?", " ").replace(",", " ").replace(":", " ").split())
    content = {w for slot in ("a", "b") for w in candidate.slots.get(slot, "").split()} - {"things"}
    deciding = tuple(sorted(words & (content | set(_ASKING[family]))))
    return SceneQuestion(family, text, candidate.answer, candidate.objects, deciding)


def _unique(values: Sequence) -> list[int]:
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _colour(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    items = scene.objects
    for i in _unique([o.shape for o in items]):
        o = items[i]
        yield _Candidate(("colour", o.shape, ""), o.colour, (i,), {"a": o.shape}, (o.combination,))
    for i in _unique([(o.size, o.shape) for o in items]):
        o = items[i]
        name = describe(o, colour=False)
        yield _Candidate(("colour", o.shape, o.size), o.colour, (i,), {"a": name}, (o.combination,))


def _shape(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    items = scene.objects
    for i in _unique([o.colour for o in items]):
        o = items[i]
        yield _Candidate(("shape", o.colour, ""), o.shape, (i,), {"a": o.colour}, (o.combination,))
    for i in _unique([(o.size, o.colour) for o in items]):
        o = items[i]
        slots = {"a": f"{o.size} {o.colour}"}
        yield _Candidate(("shape", o.colour, o.size), o.shape, (i,), slots, (o.combination,))


def _existence(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
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
            yield _Candidate(stratum, answer, objects, {"a": f"{colour} {shape}"}, ((colour, shape),), kind)


def _counting(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    items = scene.objects
    for kind, values in (("colour", COLOURS), ("shape", SHAPES)):
        for value in values:
            counted = tuple(i for i, o in enumerate(items) if getattr(o, kind) == value)
            if len(counted) > 3:
                continue
            name = plural(value) if kind == "shape" else f"{value} things"
            about = tuple(items[i].combination for i in counted)
            objects = counted or tuple(range(len(items)))
            yield _Candidate(("counting", kind), str(len(counted)), objects, {"a": name}, about)


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


def _place(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    """Of one object what ``relation_choose`` asks of two: a mapper learns that one from this one."""
    items = scene.objects
    middle = SceneObject("", "", "", IMAGE_SIZE / 2, IMAGE_SIZE / 2, 0.0, 0.0)
    for i in _unique([o.combination for o in items]):
        for direction in _lies(items[i], middle):
            first, second = rng.sample((direction, _opposite(direction)), 2)
            slots = {"a": describe(items[i], size=False), "d": _PHRASE[first], "e": _PHRASE[second]}
            stratum = ("place", _axis(direction))
            yield _Candidate(stratum, direction, (i,), slots, (items[i].combination,))


def _relation_choose(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    for i, j, a, b in _pairs(scene):
        for direction in _lies(a, b):
            first, second = rng.sample((direction, _opposite(direction)), 2)
            slots = _names(a, b) | {"d": _PHRASE[first], "e": _PHRASE[second]}
            stratum = ("relation_choose", _axis(direction))
            yield _Candidate(stratum, direction, (i, j), slots, (a.combination, b.combination))


def _relation_open(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    """Only where one object is clearly in that direction and every other one is not at all."""
    items = scene.objects
    for i in _unique([o.combination for o in items]):
        a = items[i]
        for direction in _DIRECTIONS:
            there = [j for j, o in enumerate(items) if j != i and direction in _lies(o, a)]
            nearly = [j for j, o in enumerate(items) if j != i and direction in _lies(o, a, margin=0.0)]
            if len(there) == 1 == len(nearly):
                slots = {"a": describe(a, size=False), "d": _PHRASE[direction]}
                found = items[there[0]]
                about = (a.combination, found.combination)
                stratum = ("relation_open", a.shape)
                yield _Candidate(stratum, found.shape, (i, there[0]), slots, about)


def _relation_yes_no(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    for i, j, a, b in _pairs(scene):
        for direction in _lies(a, b):
            for asked in (direction, _opposite(direction)):
                slots = _names(a, b) | {"d": _PHRASE[asked]}
                answer = "yes" if asked == direction else "no"
                stratum = ("relation_yes_no", asked)
                yield _Candidate(stratum, answer, (i, j), slots, (a.combination, b.combination))


def _comparison(scene: Scene, rng: random.Random) -> Iterator[_Candidate]:
    for i, j, a, b in _pairs(scene):
        if a.size != b.size:
            first, second = rng.sample(("bigger", "smaller"), 2)
            slots = _names(a, b) | {"d": first, "e": second}
            answer = "bigger" if a.size == "large" else "smaller"
            yield _Candidate(("comparison",), answer, (i, j), slots, (a.combination, b.combination))


_CANDIDATES = {
    "colour": _colour,
    "shape": _shape,
    "existence": _existence,
    "counting": _counting,
    "place": _place,
    "relation_choose": _relation_choose,
    "relation_open": _relation_open,
    "relation_yes_no": _relation_yes_no,
    "comparison": _comparison,
}
