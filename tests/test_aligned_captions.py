"""Captions whose words know which objects they speak of."""

import hashlib
import random
import re

import pytest
from support.scene_checker import COLOURS, SHAPES, SIZES, fits

from clipmapper.data.world.captions import (
    WORD_KINDS,
    aligned_captions,
    caption_words,
    captions,
    draw_aligned_caption,
    draw_caption,
)
from clipmapper.data.world.scenes import Scene, SceneObject, draw_scene

PLURALS = ("rings", "squares", "triangles", "crosses")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def told():
    scenes = [draw_scene(4, "aligned", index) for index in range(200)]
    return [(scene, caption) for scene in scenes for caption in aligned_captions(scene)]


def test_wording_and_random_stream_are_those_that_the_shipped_clip_was_trained_on():
    """Computed before words were aligned: any change here changes what every trained model has seen."""
    digest, rng = hashlib.sha256(), random.Random(5)
    for index in range(1500):
        scene = draw_scene(3, "golden", index)
        digest.update(draw_caption(scene, rng).encode())
        digest.update(str(rng.random()).encode())
        digest.update("|".join(captions(scene, 3)).encode())
    assert digest.hexdigest() == "16d8ac593a321eb7548e2e1a93ab3e7442432dff5d7d5954f33e695bbca4b8b5"


def test_words_are_the_text(told):
    for scene, caption in told:
        assert re.findall(r"\w+|[,:]", caption.text) == [word.text for word in caption.words]
        assert caption.text in captions(scene)


def test_attributes_belong_to_the_objects_that_the_words_speak_of(told):
    for scene, caption in told:
        for word in caption.words:
            assert all(0 <= number < len(scene.objects) for number in word.objects)
            assert (word.kind is None) == (not word.objects)
            attribute = word.text in (*COLOURS, *SIZES, *SHAPES, *PLURALS)
            assert attribute == (word.kind in ("colour", "shape", "size")), word
            if attribute:
                assert all(fits(word.text, scene.objects[number]) for number in word.objects), word


def test_one_thing_is_one_object_and_different_things_are_different_objects(told):
    """All words of "a small red ring" are about one object; "a ... a ..." is about two."""
    pattern = rf"(a|the) ((?:(?:{'|'.join(SIZES)}) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
    for _, caption in told:
        texts = " ".join(word.text for word in caption.words)
        seen = []
        for match in re.finditer(pattern, texts):
            first = texts[: match.start(2)].count(" ")
            about = {caption.words[first + k].objects for k in range(match[2].count(" ") + 1)}
            assert len(about) == 1 and len(next(iter(about))) == 1
            if match[1] == "a":
                seen.append(next(iter(about)))
            else:
                assert next(iter(about)) in seen
        assert len(set(seen)) == len(seen)


def test_relations_speak_of_the_two_things_beside_them(told):
    count = 0
    for _, caption in told:
        words = caption.words
        for place, word in enumerate(words):
            if word.kind == "relation" and words[place - 1].kind != "relation":
                before = next(w for w in reversed(words[:place]) if w.kind == "shape")
                after = next(w for w in words[place:] if w.kind == "shape")
                assert word.objects == before.objects + after.objects
                count += 1
    assert count > 100


def test_numbers_and_places(told):
    kinds = set()
    for scene, caption in told:
        for place, word in enumerate(caption.words):
            kinds.add(word.kind)
            if word.kind == "number":
                assert NUMBERS[word.text] == len(word.objects)
                following = caption.words[place + 1]
                if following.text.startswith("object"):
                    assert word.objects and set(word.objects) == set(range(len(scene.objects)))
                else:
                    assert following.objects == word.objects
            if word.kind == "place":
                (number,) = word.objects
                item = scene.objects[number]
                holds = {
                    "left": item.x < 24, "right": item.x >= 48, "top": item.y < 24, "bottom": item.y >= 48,
                    "centre": 24 <= item.x < 48 and 24 <= item.y < 48,
                }  # fmt: skip
                assert holds[word.text]
    assert kinds == {None, *WORD_KINDS}


def test_the_listed_words_are_all_that_a_caption_can_have():
    """Two objects too close to say more than "next to" are one scene in thousands: given by hand."""
    rng, drawn = random.Random(1), set()
    near = [SceneObject("ring", "red", "small", x, x, 7.7, 0.0) for x in (30.0, 39.6)]
    scenes = [draw_scene(1, "words", index) for index in range(2500)]
    for scene in (*scenes, *[Scene("near", tuple(near))] * 20):
        drawn.update(w.text for w in draw_aligned_caption(scene, rng).words)
    assert drawn == set(caption_words())
