"""Which objects the words of any caption speak of."""

import random

import pytest
from support.scene_checker import fits

from clipmapper.data.world.caption_objects import aligned_caption
from clipmapper.data.world.captions import draw_aligned_caption
from clipmapper.data.world.scenes import Scene, SceneObject, draw_scene


def item(look: str, x: float, y: float) -> SceneObject:
    size, colour, shape = look.split()
    return SceneObject(shape, colour, size, float(x), float(y), 8.0 if size == "small" else 13.0, 0.0)


SCENE = Scene(
    "by hand",
    (item("small red ring", 10, 36), item("small red cross", 40, 60), item("large blue square", 36, 12)),
)


def spoken(caption: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(word.text, word.objects) for word in aligned_caption(caption, SCENE).words if word.objects]


def test_drawn_captions_are_understood_as_they_were_meant():
    """Scenes none of whose objects could be called as another is."""
    compared = 0
    for index in range(600):
        scene = draw_scene(3, "objects", index)
        if len({(o.colour, o.shape) for o in scene.objects}) < len(scene.objects):
            continue
        drawn = draw_aligned_caption(scene, random.Random(index))
        found = aligned_caption(drawn.text, scene)
        assert found.text == drawn.text
        for own, its in zip(drawn.words, found.words, strict=True):
            assert (own.text, own.kind, set(own.objects)) == (its.text, its.kind, set(its.objects))
        compared += 1
    assert compared > 300


def test_of_twins_one_is_meant_and_not_the_same_twice():
    for index in range(300):
        scene = draw_scene(3, "objects", index)
        drawn = draw_aligned_caption(scene, random.Random(index))
        for own, its in zip(drawn.words, aligned_caption(drawn.text, scene).words, strict=True):
            assert len(own.objects) == len(its.objects)
            if own.kind in ("size", "colour", "shape") and len(its.objects) == 1:
                assert fits(its.text, scene.objects[its.objects[0]])


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a red ring and a green square", [("red", (0,)), ("ring", (0,))]),
        (
            "a red ring is left of a blue square",
            [("red", (0,)), ("ring", (0,)), ("left", (0, 2)), ("of", (0, 2)), ("blue", (2,)),
             ("square", (2,))],
        ),
        ("a red ring is left of a green square", [("red", (0,)), ("ring", (0,))]),
        ("a green ring at the left", []),
        (
            "three objects : two rings and one square",
            [("three", (0, 1, 2)), ("two", (0,)), ("rings", (0,)), ("one", (2,)), ("square", (2,))],
        ),
        (
            "three objects: two red things and one blue thing",
            [("three", (0, 1, 2)), ("two", (0, 1)), ("red", (0, 1)), ("one", (2,)), ("blue", (2,))],
        ),
        (
            "a cross, a blue square and a ring",
            [("cross", (1,)), ("blue", (2,)), ("square", (2,)), ("ring", (0,))],
        ),
    ],
)  # fmt: skip
def test_what_does_not_hold_speaks_of_what_is_there(caption, expected):
    assert spoken(caption) == expected


@pytest.mark.parametrize("caption", ["", "a red", "ring a red", "a red ring a blue square"])
def test_what_is_not_understood(caption):
    assert aligned_caption(caption, SCENE) is None
