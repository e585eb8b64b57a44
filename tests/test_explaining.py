"""``clipmapper.explain``, and scoring variants of a sample with tokens removed (``kept_scorer``)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import tiny_models, training_models
from support.compared_methods import METHODS
from torch import nn

import clipmapper
from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.vqa.explain import explain_answers, trace_answers

QUESTION = "is the chartreuse ring left of the cross?"
WORDS = ["is", "the", "chartreuse", "ring", "left", "of", "the", "cross", "?"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(architecture):
    return training_models.tiny_model(architecture).eval()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return training_models.small_scenes().validation[3].image.pixels


# What an explanation holds


@pytest.mark.parametrize("method", METHODS)
def test_explanation_of_the_model_s_own_answer(model, picture, method):
    explanation = clipmapper.explain(model, picture, QUESTION, method=method)
    with torch.no_grad():
        logits = model(model.load_image(picture), model.tokenize(QUESTION))[0]
    assert explanation.answer == model.answers[int(logits.argmax())] == model.answer(picture, QUESTION)
    assert explanation.score == pytest.approx(float(logits.exp().max() / logits.exp().sum()), rel=1e-5)
    assert explanation.patches.shape == training_models.GRID
    assert (explanation.question, explanation.method) == (QUESTION, method)
    assert np.array_equal(explanation.image, picture)
    assert [word for word, _ in explanation.words] == WORDS
    assert np.isfinite(explanation.patches).all()
    # Untrained, the last attention's gradient may speak against the answer everywhere: Grad-CAM is 0 then.
    assert np.ptp(explanation.patches) > 0 or method == "grad_cam"


def test_pieces_of_a_word_are_merged(model, picture):
    """Relevance of a word is that of its pieces, whatever the method makes of start and end tokens."""
    text = model.tokenize(QUESTION)
    assert int(text.removable.sum()) > len(WORDS)  # at least one word has several pieces
    relevance = METHODS["gae"](trace_answers(model, model.load_image(picture), text).trace)
    explanation = clipmapper.explain(model, picture, QUESTION, method="gae")
    pieces = [model.encoder.tokenizer.decode([i]) for i in text.ids[0, 1:-1].tolist()]
    at, expected = 0, []
    for word in WORDS:
        length = next(n for n in range(1, 9) if "".join(pieces[at : at + n]).replace(" ", "") == word)
        expected.append(float(relevance.text[0, 1 + at : 1 + at + length].sum()))
        at += length
    assert at == len(pieces)
    assert [score for _, score in explanation.words] == pytest.approx(expected, rel=1e-5)
    assert np.allclose(explanation.patches, relevance.image[0].numpy(), rtol=1e-5)


def test_another_answer_can_be_explained(model, picture):
    own = clipmapper.explain(model, picture, QUESTION)
    other = next(answer for answer in model.answers if answer != own.answer)
    explanation = clipmapper.explain(model, picture, QUESTION, answer=other)
    with torch.no_grad():
        logits = model(model.load_image(picture), model.tokenize(QUESTION))[0]
    assert explanation.answer == other
    assert explanation.score == pytest.approx(float(logits.softmax(0)[model.answers.index(other)]), rel=1e-5)
    assert explanation.score < own.score
    assert not np.allclose(explanation.patches, own.patches)


def test_image_may_be_a_path_an_image_or_an_array(model, picture, tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(picture).save(path)
    maps = [clipmapper.explain(model, x, QUESTION) for x in (picture, path, str(path), Image.open(path))]
    for explanation in maps[1:]:
        assert np.array_equal(explanation.patches, maps[0].patches)
        assert explanation.words == maps[0].words


def test_several_methods_at_once_are_each_on_its_own(model, picture):
    together = explain_answers(model, picture, QUESTION, list(METHODS))
    for explanation, method in zip(together, METHODS, strict=True):
        alone = clipmapper.explain(model, picture, QUESTION, method=method)
        assert explanation.method == method
        assert np.array_equal(explanation.patches, alone.patches) and explanation.words == alone.words
    maps = {explanation.patches.tobytes() for explanation in together}
    assert len(maps) == len(METHODS)


def test_plot_writes_a_picture(model, picture, tmp_path):
    path = clipmapper.explain(model, picture, QUESTION).plot(tmp_path / "new folder" / "why.png")
    assert path == tmp_path / "new folder" / "why.png"
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 400
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    with pytest.raises(UserError, match=r"why\.gif"):
        clipmapper.explain(model, picture, QUESTION).plot(tmp_path / "why.gif")


# Mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "lime"}, "unknown method 'lime'; the methods are weighted, "),
        ({"answer": "gren"}, "answer 'gren' is not one of the model's 24 answers; did you mean green"),
        ({"question": " \t"}, "the question is empty"),
        ({"image": "missing.png"}, "image=missing.png: no such file"),
        ({"image": Path(__file__)}, "not a readable image"),
        ({"image": np.zeros((4, 4), dtype=np.uint8)}, "image: an array must be uint8 [height, width, 3]"),
    ],
)
def test_mistake_is_one_line(model, picture, change, says):
    arguments = {"image": picture, "question": QUESTION} | change
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        clipmapper.explain(model, **arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_question_longer_than_the_context_is_cut_with_a_warning(model, picture):
    question = "is the ring red or " * 20
    room = model.encoder.context_length - 2
    with pytest.warns(UserWarning, match=rf"text of 100 tokens is cut to the {room} that the context has"):
        explanation = clipmapper.explain(model, picture, question)
    assert [word for word, _ in explanation.words] == (question.split() * 2)[:room]


# The model afterwards


def marks(model: nn.Module) -> dict:
    """Everything about a model that explaining might leave changed."""
    hooks = [
        (name, kind, tuple(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in vars(module)
        if "hook" in kind and getattr(module, kind)
    ]
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "attention": F.scaled_dot_product_attention,
        "hooks": hooks,
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "weights": {name: value.clone().numpy().tobytes() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_model_is_left_as_it_was(architecture, picture, training, frozen):
    model = training_models.tiny_model(architecture, frozen=frozen).train(training)
    model.head.requires_grad_(False)
    model.mapper.register_forward_hook(lambda *_: None)
    before = marks(model)
    with torch.set_grad_enabled(training):
        clipmapper.explain(model, picture, QUESTION, method="random")
        with pytest.raises(RuntimeError):
            clipmapper.explain(model, torch.zeros(3, 5, 5), QUESTION)
    assert marks(model) == before
    assert before["hooks"] and any(before["modes"].values()) == training


# Scoring with tokens removed


LENGTHS = (7, 4, 9)
CASES = [
    (kind, class_token, tower)
    for kind, class_token in (("dual_flow", False), ("dual_flow", True), ("single_flow", False))
    for tower in ("causal", "unmasked", "class_token")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


class Calls:
    """How often each tower of a model has run, and on how many samples."""

    def __init__(self, model) -> None:
        self.image: list[int] = []
        self.text: list[int] = []
        clip = model.encoder.clip
        blocks = getattr(clip, "transformer", None) or clip.text.transformer
        clip.visual.transformer.register_forward_hook(lambda m, a, out: self.image.append(len(out)))
        blocks.register_forward_hook(lambda m, a, out: self.text.append(len(out)))

    def since(self) -> tuple[list[int], list[int]]:
        found = self.image, self.text
        self.image, self.text = [], []
        return found


# Variants of three samples: the same sample twice, and not in order.
SAMPLE = torch.tensor([2, 0, 2, 1])
IMAGE_KEEP = torch.tensor([[0, 3, 8], [1, 2, 4], [5, 6, 7], [0, 1, 8]])
TEXT_KEEP = torch.tensor([[0, 2, 5, 8], [0, 1, 6, -1], [0, 3, 4, 8], [0, 3, -1, -1]])


def forward(model, images, text: TokenizedText, sample: int, image_kept=None, text_kept=None):
    """Logits of one variant by one whole forward in which what is not kept is masked."""
    alone = text[[sample]]
    ignored = {}
    if image_kept is not None:
        mask = torch.ones(1, tiny_models.PATCHES, dtype=torch.bool)
        mask[0, image_kept] = False
        ignored["image_ignore"] = mask
    if text_kept is not None:
        mask = alone.valid.clone()
        mask[0, text_kept[text_kept >= 0]] = False
        ignored["text_ignore"] = mask
    with torch.no_grad():
        return model(images[[sample]], alone, **ignored)[0]


@pytest.mark.parametrize(("kind", "class_token", "tower"), CASES)
def test_kept_scorer_is_a_forward_with_the_rest_masked(folder, kind, class_token, tower):
    # A mapper with its own class token goes with towers without one: positions are not for this pair of them.
    options = {"text_tower": tower, "image_position_embedding": not class_token}
    model = tiny_models.clipmapper(folder, kind, class_token, **options)
    images, text = tiny_models.images(3), tiny_models.texts(LENGTHS)
    scorer = model.kept_scorer(images, text)
    calls = Calls(model)
    found = []
    for image_keep, text_keep in (
        (None, None),
        (IMAGE_KEEP, None),
        (None, TEXT_KEEP),
        (IMAGE_KEEP, TEXT_KEEP),
        (IMAGE_KEEP[:, :0], None),
    ):
        logits = scorer(SAMPLE, image_keep, text_keep)
        ran = calls.since()
        # A tower runs once over the variants when its own tokens change, and not at all otherwise.
        assert ran == ([4] if image_keep is not None else [], [4] if text_keep is not None else [])
        for row, sample in enumerate(SAMPLE.tolist()):
            kept = (keep if keep is None else keep[row] for keep in (image_keep, text_keep))
            expected = forward(model, images, text, sample, *kept)
            assert torch.allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
        calls.since()
        found.append(logits)
    assert all(not torch.allclose(found[0], other, atol=1e-3) for other in found[1:])


def test_kept_scorer_agrees_with_physical_removal_in_forward(folder):
    model = tiny_models.clipmapper(folder, image_position_embedding=True)
    images, text = tiny_models.images(3), tiny_models.texts(LENGTHS)
    scorer = model.kept_scorer(images, text)
    with torch.no_grad():
        whole = model(images[SAMPLE], text[SAMPLE], image_keep=IMAGE_KEEP, text_keep=TEXT_KEEP)
    assert torch.allclose(scorer(SAMPLE, IMAGE_KEEP, TEXT_KEEP), whole, rtol=1e-9)
    assert not whole.requires_grad and not scorer(SAMPLE, None, None).requires_grad


def test_kept_scorer_encodes_the_samples_once(folder):
    model = tiny_models.clipmapper(folder)
    calls = Calls(model)
    scorer = model.kept_scorer(tiny_models.images(3), tiny_models.texts(LENGTHS))
    assert calls.since() == ([3], [3])
    for sample in range(3):
        scorer(torch.tensor([sample]), None, None)
    assert calls.since() == ([], [])
