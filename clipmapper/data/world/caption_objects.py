"""Which objects of a scene the words of any caption speak of: of captions that a model has written."""

import re
from collections.abc import Iterator

from clipmapper.data.world.caption_truth import best_meaning, fits, read_caption
from clipmapper.data.world.captions import AlignedCaption, CaptionWord, plural
from clipmapper.data.world.scenes import COLOURS, SHAPES, SIZES, Scene

_KINDS = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))


def aligned_caption(caption: str, scene: Scene) -> AlignedCaption | None:
    """A caption with the objects that its words speak of, as :func:`draw_aligned_caption` has them; None for
    one that is not understood.

    A thing means the object that :func:`~clipmapper.data.world.caption_truth.caption_truth` finds for it.
    Words for a thing that is not what it is called speak of no object, and neither do those for how others
    lie to it; numbers and kinds speak of the objects that are so, however many there are.
    """
    said = read_caption(caption)
    if said is None:
        return None
    chosen, _ = best_meaning(said, scene.objects)
    places = {id(item): place for place, item in enumerate(scene.objects)}
    meant = [
        (places[id(item)],) if item is not None and fits(name, item) else ()
        for name, item in zip(said.things, chosen, strict=True)
    ]
    words = list(_opening(said.opening, len(scene.objects)))
    for number, (clause, mentioned) in enumerate(said.clauses):
        if number:
            words.append(CaptionWord("and" if number == len(said.clauses) - 1 else ","))
        words += _clause(clause, {name: meant[thing] for name, thing in mentioned.items()}, scene)
    return AlignedCaption(tuple(words))


def _opening(opening: re.Match, objects: int) -> Iterator[CaptionWord]:
    for word in re.findall(r"\w+|[,:]", opening[0]):
        yield _word(word, "number", tuple(range(objects)) if word == opening["total"] else ())


def _clause(clause: re.Match, meant: dict[str, tuple[int, ...]], scene: Scene) -> Iterator[CaptionWord]:
    groups = clause.groupdict()
    if kind := groups.get("kind"):
        name = kind.split()[0]
        of = tuple(
            place
            for place, item in enumerate(scene.objects)
            if name in (item.colour, item.shape, plural(item.shape))
        )
        yield _word(clause["number"], "number", of)
        yield _word(name, "colour" if name in COLOURS else "shape", of)
        yield from map(CaptionWord, kind.split()[1:])
        return
    both = meant["a"] + meant["b"] if meant["a"] and meant.get("b") else ()
    about = {"place": ("place", meant["a"]), "how": ("relation", both)}
    for found in re.finditer(r"\w+", clause[0]):
        inside = [name for name in groups if groups[name] and _within(found, clause.span(name))]
        if not inside or inside[0] == "article":
            yield CaptionWord(found[0])
        elif inside[0] in about:
            yield _word(found[0], *about[inside[0]])
        else:
            kind = next(kind for kind, words in _KINDS if found[0] in words)
            yield _word(found[0], kind, meant[inside[0]])


def _within(word: re.Match, span: tuple[int, int]) -> bool:
    return span[0] <= word.start() < span[1]


def _word(text: str, kind: str, objects: tuple[int, ...]) -> CaptionWord:
    """A word of a kind where it speaks of something, else a plain one."""
    return CaptionWord(text, kind, objects) if objects else CaptionWord(text)
