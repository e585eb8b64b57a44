"""Leave-one-out: by how much y falls without one token, against the model's own physical removal."""

import numpy as np
import pytest
import torch
from support import caption_models, families, training_models

from clipmapper.errors import UserError
from clipmapper.evaluation.perturbation import kept_indices
from clipmapper.relevance import METHODS, record
from clipmapper.tasks.captioning.trace import trace_caption, word_relevance
from clipmapper.tasks.vqa.explain import trace_answers

CAPTION = "a red ring left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("removal")


@pytest.fixture(scope="module", params=["dual_flow", "single_flow"])
def asked(request, folder):
    model = training_models.tiny_model(training_models.tiny_clip(folder), mapper=request.param).double()
    images = torch.randn(2, 3, 72, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, images, model.tokenize(["is the red ring left of the cross?", "what colour?"])


def test_all_but_one():
    kept = np.arange(4) != np.array([[0], [2], [3]])
    assert kept_indices(kept).tolist() == [
        [1, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]


@pytest.mark.parametrize("explained", ["logit", "probability"])
def test_every_token_of_a_question(asked, explained):
    model, images, text = asked
    traced = trace_answers(model, images, text, [3, 1], explained=explained)
    found = METHODS["leave_one_out"](traced.trace, sign="both")

    def y(row, image_keep=None, text_keep=None):
        with torch.no_grad():
            logits = model(images[[row]], text[[row]], image_keep=image_keep, text_keep=text_keep)[0]
        return (logits if explained == "logit" else logits.softmax(0))[[3, 1][row]]

    for row in range(2):
        whole, length = y(row), int(text.valid[row].sum())
        for patch in range(9):
            keep = torch.tensor([[p for p in range(9) if p != patch]])
            expected = whole - y(row, image_keep=keep)
            torch.testing.assert_close(found.image[row].flatten()[patch], expected, rtol=1e-9, atol=1e-12)
        for token in range(1, length - 1):
            keep = torch.tensor([[t for t in range(length) if t != token]])
            expected = whole - y(row, text_keep=keep)
            torch.testing.assert_close(found.text[row, token], expected, rtol=1e-9, atol=1e-12)
        always = [0, *range(length - 1, text.ids.shape[1])]  # start, end, padding
        assert not found.text[row, always].any() and found.text[row].any() and found.image[row].any()


def test_signs(asked):
    trace = trace_answers(*asked, [3, 1]).trace
    both, against = (METHODS["leave_one_out"](trace, sign=sign) for sign in ("both", "negative"))
    torch.testing.assert_close(METHODS["leave_one_out"](trace).image, both.image.clamp(min=0))
    torch.testing.assert_close(against.text, (-both.text).clamp(min=0))
    assert (both.image > 0).any() and (both.image < 0).any()


GPT2 = {"path": None, "layers": 1, "width": 16, "heads": 2, "frozen": False}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mapper": "single_flow", "text_embedding_only": True},
        {"mapper": "single_flow", "decoder": "gpt2_cross", "gpt2": GPT2},
    ],
    ids=["dual_flow", "single_flow", "GPT-2"],
)
def test_every_token_of_a_caption(settings, folder):
    model = caption_models.captioner(training_models.tiny_clip(folder), **settings)
    pixels = torch.randn(1, 3, 72, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    traced = trace_caption(model, pixels, CAPTION)
    ids, found = traced.text.ids[0], []

    def probe(trace):
        found.append(METHODS["leave_one_out"](trace, sign="both"))
        return found[-1]

    METHODS["probe"] = probe
    try:
        word_relevance(traced, [0, 4], ["probe"])
    finally:
        del METHODS["probe"]
    for row, place in enumerate((1, 5)):

        def y(place=place, **without):
            with torch.no_grad():
                return model(pixels, traced.text, **without)[0, place - 1, ids[place]]

        maps = found[0].image[row].flatten()
        for patch in range(9):
            keep = torch.tensor([[p for p in range(9) if p != patch]])
            torch.testing.assert_close(maps[patch], y() - y(image_keep=keep), rtol=1e-9, atol=1e-12)
        for token in range(1, place):
            ignore = torch.arange(len(ids))[None] == token
            expected = y() - y(text_ignore=ignore)
            torch.testing.assert_close(found[0].text[row, token], expected, rtol=1e-9, atol=1e-12)
        assert not found[0].text[row, place:].any() and not found[0].text[row, 0]
    assert found[0].text[1].any()


def test_a_model_that_nobody_said_how_to_shorten():
    case = families.hf_bert()
    with record(case.model) as trace:
        y = case.y(case.run(case.model, case.inputs))
    with pytest.raises(UserError, match="leave_one_out runs the model more than once"):
        METHODS["leave_one_out"](trace, y)


def test_it_is_fitted_to_removal(asked):
    """The first token that the perturbation test removes by it is the one that costs most."""
    model, images, text = asked
    traced = trace_answers(model, images, text)
    found = METHODS["leave_one_out"](traced.trace, sign="both").image.flatten(1)
    for row in range(2):
        scorer = model.kept_scorer(images[[row]], text[[row]])
        logits = scorer(torch.zeros(9, dtype=torch.long), kept_indices(~np.eye(9, dtype=bool)), None)
        assert int(found[row].argmax()) == int(logits[:, traced.explained[row]].argmin())
    assert np.isfinite(found.numpy()).all()


def test_under_autocast_and_one_by_one(asked):
    model, images, text = asked
    whole = METHODS["leave_one_out"](trace_answers(model, images, text, [3, 1]).trace, sign="both")
    alone = METHODS["leave_one_out"](trace_answers(model, images[1:], text[1:], [1]).trace, sign="both")
    torch.testing.assert_close(alone.image, whole.image[1:])
    mapper = model.description["model"]["mapper"]
    rounded = training_models.tiny_model(model.encoder.architecture, mapper=mapper)
    with torch.autocast("cpu", torch.bfloat16):
        found = METHODS["leave_one_out"](trace_answers(rounded, images.float(), text, [3, 1]).trace)
    assert found.image.isfinite().all() and found.image.any()
