"""The generic recorder: on each family of models, three methods equal a naive float64 implementation."""

import pytest
from support import tiny_models
from support.families import CASES, check, open_clip_similarity

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_implementation(name):
    check(CASES[name]())


@pytest.mark.parametrize("kind", tiny_models.TEXT_TOWERS)
def test_both_towers_of_an_open_clip_model(kind, tmp_path):
    check(open_clip_similarity(tmp_path, kind))
