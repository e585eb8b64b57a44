"""Questions about built-in scenes, each with its answer and what decides it.

Answers are balanced inside every *stratum* (a family, and what its wording gives away, such as the shape
that is asked for), so that the words of a question say next to nothing about its answer.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from clipmapper.data.world.question_candidates import CANDIDATES, DIRECTIONS, Candidate
from clipmapper.data.world.scenes import COLOURS, HELD_OUT, MAX_OBJECTS, SHAPES, SIZES, Scene

# Chance of a guess that knows the question's wording, in percent of questions: 1 / number of its answers.
CHANCE = {
    "colour": 1 / 6,
    "shape": 1 / 4,
    "existence": 1 / 2,
    "counting": 1 / 4,
    "place": 1 / 2,
    "size": 1 / 2,
    "relation_choose": 1 / 2,
    "relation_open": 1 / 4,
    "relation_yes_no": 1 / 2,
    "comparison": 1 / 2,
}
FAMILIES = tuple(CHANCE)
ANSWERS = (*COLOURS, *SHAPES, "yes", "no", "0", "1", "2", "3", *DIRECTIONS, *SIZES, "bigger", "smaller")

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
    "size": (
        "is the {a} {d} or {e}?",
        "is it a {d} or a {e} {a}?",
        "does the {a} look {d} or {e}?",
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
    "place": DIRECTIONS,
    "size": SIZES,
    "relation_choose": DIRECTIONS,
    "relation_open": DIRECTIONS,
    "relation_yes_no": DIRECTIONS,
    "comparison": ("bigger", "smaller"),
}


@dataclass(frozen=True)
class SceneQuestion:
    """A question, its answer, and the truth about what decides it.

    ``deciding_objects``: positions in ``scene.objects`` of those whose pixels decide the answer (for "no"
    and "0": the objects that share a property with what is asked for, or all of them where none does).
    ``deciding_words``: the words whose change would change what is asked. ``told_by_size``: the colour or
    shape of one of two objects that only their size tells apart.
    """

    family: str
    text: str
    answer: str
    deciding_objects: tuple[int, ...]
    deciding_words: tuple[str, ...]
    told_by_size: bool = False


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
            options = [c for c in CANDIDATES[family](scene, rng) if _about_held_out(c) == held_out]
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

    def take(self, family: str, options: Sequence[Candidate]) -> Candidate | None:
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
        return SIZES if family == "size" else ("bigger", "smaller")


def draw_presupposition(scene: Scene, rng: random.Random) -> str:
    """A question that takes this scene for granted, without its answer (text for contrastive training)."""
    families = list(FAMILIES)
    rng.shuffle(families)
    for family in families:
        options = [c for c in CANDIDATES[family](scene, rng) if c.answer not in ("no", "0")]
        if options:
            return _word(family, rng.choice(options), rng).text
    return f"is there a {scene.objects[0].shape}?"


def _about_held_out(candidate: Candidate) -> bool:
    return any(combination in HELD_OUT for combination in candidate.combinations)


def _word(family: str, candidate: Candidate, rng: random.Random) -> SceneQuestion:
    text = rng.choice(_TEMPLATES[family]).format(**candidate.slots)
    words = set(text.replace("?", " ").replace(",", " ").replace(":", " ").split())
    content = {w for slot in ("a", "b") for w in candidate.slots.get(slot, "").split()} - {"things"}
    deciding = tuple(sorted(words & (content | set(_ASKING[family]))))
    return SceneQuestion(family, text, candidate.answer, candidate.objects, deciding, candidate.told_by_size)
