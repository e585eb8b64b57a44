"""Methods that run the model again, of the words of a caption."""

from itertools import product

import numpy as np
import pytest
import torch
from support import caption_models, training_models
from support.slow import once_each

from clipmapper.data.images import clip_input
from clipmapper.relevance import METHODS
from clipmapper.relevance.explained_scalar import EXPLAINED
from clipmapper.tasks.captioning.explain import explain_captions
from clipmapper.tasks.captioning.trace import trace_caption, word_relevance

GPT2 = {"path": None, "layers": 1, "width": 16, "heads": 2, "frozen": False}
CASES = {
    "dual_flow": {},
    "single_flow": {"mapper": "single_flow"},
    "text embedding": {"text_embedding_only": True},
    "GPT-2, cross": {"mapper": "single_flow", "decoder": "gpt2_cross", "gpt2": GPT2},
}
CAPTION = "a red ring left of a blue square"


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def picture():
    return caption_models.picture()


@pytest.mark.parametrize(("case", "explained"), once_each(product(CASES, EXPLAINED)))
def test_what_is_run_again_is_what_was_traced(architecture, picture, case, explained, monkeypatch):
    """The same numbers for every token, and a recording of it explains the same: it reads the same rows."""
    model = caption_models.captioner(architecture, **CASES[case])
    found = []

    def probe(trace):
        again = trace.again.recorded(trace, "plain")
        rows = torch.arange(trace.batch)
        y = trace.again.scalar.value(trace.again.forward(rows), rows)
        found.append((y, METHODS["gae"](again)))
        return METHODS["gae"](trace)

    monkeypatch.setitem(METHODS, "probe", probe)
    monkeypatch.setattr("clipmapper.tasks.captioning.trace.AT_ONCE", 3)
    traced = trace_caption(model, clip_input(picture[None], model.encoder.clip.visual).double(), CAPTION)
    scores = traced.scores
    if explained != "logit":
        scores = scores.softmax(dim=-1) if explained == "probability" else scores.log_softmax(dim=-1)
    ids = traced.text.ids[0]
    expected = scores[torch.arange(8), ids[1:9]].detach()
    words = word_relevance(traced, range(8), ["probe"], explained=explained)["probe"]
    torch.testing.assert_close(torch.cat([y for y, _ in found]).detach(), expected, rtol=0, atol=1e-9)
    maps = torch.cat([again.image for _, again in found]).numpy()
    np.testing.assert_allclose(maps, words.maps, rtol=1e-7, atol=1e-9)
    text = torch.cat([again.text for _, again in found])[:, 1:9].numpy()
    np.testing.assert_allclose(text, words.matrix, rtol=1e-7, atol=1e-9)
    assert len(found) == 3 and words.maps.any()


def test_occlusion_is_what_the_word_loses_without_a_patch(architecture, picture):
    model = caption_models.captioner(architecture).float()
    found = explain_captions(model, picture, methods=["occlusion", "legrad"], caption=CAPTION)[0]
    pixels = clip_input(picture[None], model.encoder.clip.visual)
    text = model.tokenize(CAPTION)
    lost = torch.zeros(8, 9)
    first = model.encoder.image_tower.attention_blocks()[0]
    with torch.no_grad():
        whole = model(pixels, text)[0]
        for patch in range(9):

            def without(module, args, patch=patch):
                tokens = args[0].clone()
                tokens[:, 1 + patch] = 0
                return (tokens, *args[1:])

            handle = first.register_forward_pre_hook(without)
            change = whole - model(pixels, text)[0]
            handle.remove()
            lost[:, patch] = change[torch.arange(8), text.ids[0, 1:9]]
    np.testing.assert_allclose(found.maps.reshape(8, 9), lost.clamp(min=0).numpy(), rtol=1e-3, atol=1e-4)
    assert found.maps.any() and not np.triu(found.word_matrix, 1).any()
