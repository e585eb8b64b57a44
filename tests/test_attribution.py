"""The call forms of captum and Quantus, with their own code as the client."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from support import families, tiny_models
from support.slow import once_each

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText
from clipmapper.relevance import METHODS, Attribution, quantus_explainer, record
from clipmapper.tasks.vqa.explain import trace_answers

LENGTHS = (7, 4, 9, 6)
ANSWERS = [1, 3, 0, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.clipmapper(tmp_path_factory.mktemp("clip"))


IMAGES, TEXT = tiny_models.images(len(LENGTHS)), tiny_models.texts(LENGTHS)


def answer(model, images, ids):
    valid = ids != 0
    return model(images, TokenizedText(ids, valid, valid), only_class_token=False)


def attribution(model, name="weighted"):
    return Attribution(model, METHODS[name], partial(answer, model))


@pytest.mark.parametrize(
    ("name", "size"), once_each(product(["weighted", "gae", "weighted_libra", "occlusion"], [None, 3]))
)
def test_output_mirrors_the_inputs_whatever_the_batches(model, name, size):
    expected = METHODS[name](trace_answers(model, IMAGES, TEXT, ANSWERS).trace)
    target = torch.tensor(ANSWERS)
    found = attribution(model, name).attribute((IMAGES, TEXT.ids), target, internal_batch_size=size)
    assert isinstance(found, tuple) and len(found) == 2
    for values, stream in zip(found, ("image", "text"), strict=True):
        torch.testing.assert_close(values, expected.streams[stream], rtol=0, atol=1e-6)
    alone = attribution(model, name).attribute(IMAGES, target, TEXT.ids, internal_batch_size=size)
    torch.testing.assert_close(alone, expected.streams["image"], rtol=0, atol=1e-6)


def test_targets(model):
    explain = attribution(model)
    inputs = IMAGES, TEXT.ids
    by_number = explain.attribute(inputs, 2)
    for target in (torch.tensor(2), torch.tensor([2] * 4), [2] * 4, (2,), lambda out: out[:, 2]):
        for a, b in zip(explain.attribute(inputs, target), by_number, strict=True):
            assert torch.equal(a, b)
    contrast, _ = explain.attribute(inputs, lambda out: out[:, 2] - out[:, 0])
    assert not torch.allclose(contrast, by_number[0], atol=1e-3)
    with pytest.raises(UserError, match="3 entries for 4 samples"):
        explain.attribute(inputs, [1, 2, 0])
    with pytest.raises(UserError, match="not one scalar a sample"):
        explain.attribute(inputs)
    with pytest.raises(UserError, match=r"target \[99, 99, 99, 99\]: the output is \(4, "):
        explain.attribute(inputs, 99)
    with pytest.raises(UserError, match=r"target=1.5: must be a class"):
        explain.attribute(inputs, torch.tensor(1.5))
    for size in (0, -1):
        with pytest.raises(UserError, match=f"internal_batch_size={size}: at least 1"):
            explain.attribute(inputs, 1, internal_batch_size=size)
    with pytest.raises(UserError, match="0 samples"):
        explain.attribute((IMAGES[:0], TEXT.ids[:0]), 1)


def test_captum_s_sensitivity_takes_it(model):
    generator = torch.Generator().manual_seed(0)

    def perturb(images):
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return images + 1e-3 * noise

    found = sensitivity_max(
        attribution(model).attribute, IMAGES, perturb, n_perturb_samples=2,
        target=torch.tensor(ANSWERS), additional_forward_args=(TEXT.ids,),
    )  # fmt: skip
    assert found.shape == (4,) and (found > 0).all() and (found < 0.2).all()


@pytest.mark.filterwarnings("ignore")
def test_quantus_metrics_take_it(model):
    quantus = pytest.importorskip("quantus")
    ids = TEXT.ids[:1]

    def run(model, images):
        return answer(model, images, ids.expand(len(images), -1))

    explain = quantus_explainer(METHODS["weighted"], run)
    images, targets = IMAGES.numpy(), np.array(ANSWERS)
    maps = explain(model, images, targets)
    assert maps.shape == (4, 1, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE)
    size = tiny_models.PATCH_SIZE
    assert (maps[:, :, :size, :size] == maps[:, :, :1, :1]).all(), "a patch's pixels share its relevance"
    text = TokenizedText(*(t[:1].expand(4, -1) for t in vars(TEXT).values()))
    expected = METHODS["weighted"](trace_answers(model, IMAGES, text, ANSWERS).trace).image
    np.testing.assert_allclose(maps[:, 0, ::size, ::size], expected.numpy(), rtol=0, atol=1e-10)
    sparseness = quantus.Sparseness(disable_warnings=True, display_progressbar=False)
    scores = sparseness(
        model=model, x_batch=images, y_batch=targets, a_batch=None, explain_func=explain, channel_first=True
    )
    assert len(scores) == 4 and all(0 < score < 1 for score in scores)


@pytest.fixture(scope="module")
def vit():
    return families.hf_vit()


def test_models_of_other_people(vit):
    """Captum's habits on HF ViT: an output that is no tensor, targets, batches in parts, options."""
    images = vit.inputs["pixel_values"]
    explain = Attribution(vit.model, METHODS["gae"], lambda x: vit.model(pixel_values=x).logits)
    with record(vit.model) as trace:
        logits = vit.model(pixel_values=images).logits
    expected = METHODS["gae"](trace, logits[torch.arange(2), torch.tensor([3, 1])])
    for size in (None, 1):
        found = explain.attribute(images, target=[3, 1], internal_batch_size=size)
        torch.testing.assert_close(found, expected.streams["image"])
    late = explain.attribute(images, target=[3, 1], start_layer=-1, sign="negative")
    assert late.shape == found.shape and not torch.allclose(late, found)
    raw = Attribution(vit.model, METHODS["gae"])
    with pytest.raises(UserError, match=r"gives ImageClassifierOutput, no tensor: give forward="):
        raw.attribute(images, target=1)
    assert torch.equal(raw.attribute(images, lambda out: out.logits[:, 1]), explain.attribute(images, 1))


def test_inputs_of_two_streams_and_what_goes_with_them():
    """LXMERT: word numbers and region features as inputs; positions and mask are divided with the batch."""
    case = families.hf_lxmert()
    given = case.inputs

    def forward(ids, features, positions, mask):
        out = case.model(input_ids=ids, visual_feats=features, visual_pos=positions, attention_mask=mask)
        return out.question_answering_score

    inputs = given["input_ids"], given["visual_feats"]
    rest = given["visual_pos"], given["attention_mask"]
    explain = Attribution(case.model, METHODS["weighted"], forward, streams=("text", "image"))
    words, regions = explain.attribute(inputs, 3, rest, internal_batch_size=1)
    with record(case.model) as trace:
        y = forward(*inputs, *rest)[:, 3]
    expected = METHODS["weighted"](trace, y).streams
    torch.testing.assert_close(words, expected["text"])
    torch.testing.assert_close(regions, expected["image"])


@pytest.mark.parametrize("name", ["integrated_gradients", "occlusion"])
def test_captum_s_methods_on_a_vit_are_captum_s(vit, name):
    from captum import attr

    images, hidden = vit.inputs["pixel_values"], []
    first = vit.model.vit.layers[0]
    handle = first.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach()))
    vit.model(pixel_values=images)
    handle.remove()

    def forward(tokens):
        handle = first.register_forward_pre_hook(lambda m, args: (tokens, *args[1:]))
        try:
            return vit.model(pixel_values=images[:1].expand(len(tokens), -1, -1, -1)).logits
        finally:
            handle.remove()

    tokens = hidden[0][:1]
    if name == "occlusion":
        expected = attr.Occlusion(forward).attribute(tokens, (1, tokens.shape[-1]), target=2)[..., 0].double()
        options = {}
    else:
        options = {"steps": 10}
        expected = attr.IntegratedGradients(forward).attribute(tokens, target=2, n_steps=10).sum(-1)
    explain = Attribution(vit.model, METHODS[name], lambda x: vit.model(pixel_values=x).logits)
    found = explain.attribute(images[:1], 2, sign="both", **options)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_quantus_faithfulness_and_randomisation_take_it():
    """Quantus explains, removes pixels and asks again; and explains a copy with other weights."""
    quantus = pytest.importorskip("quantus")
    torch.manual_seed(0)
    model = families.timm_vit().float()
    images, targets = families.pixels(2).float().numpy(), np.array([1, 3])
    explain = quantus_explainer(METHODS["gae"])
    arguments = {
        "model": model, "x_batch": images, "y_batch": targets, "a_batch": None, "explain_func": explain,
        "channel_first": True, "device": "cpu",
    }  # fmt: skip
    quiet = {"disable_warnings": True, "display_progressbar": False}
    faithful = quantus.FaithfulnessCorrelation(nr_runs=5, subset_size=20, return_aggregate=False, **quiet)
    scores = faithful(**arguments)
    assert len(scores) == 2 and np.isfinite(scores).all()
    random = quantus.MPRT(layer_order="top_down", **quiet)
    layers = random(**arguments)
    assert len(layers) > 3 and all(np.isfinite(list(v)).all() for v in layers.values())


def test_each_input_gets_its_own_stream_whatever_the_order():
    """SigLIP runs its words first and has pooling queries for a third stream."""
    case = families.hf_siglip()
    ids, images = case.inputs["input_ids"], case.inputs["pixel_values"]
    with record(case.model) as trace:
        y = case.y(case.model(**case.inputs))
    expected = METHODS["weighted"](trace, y).streams

    def forward(first, second):
        pair = (first, second) if first.ndim == 2 else (second, first)
        return case.model(input_ids=pair[0], pixel_values=pair[1])

    explain = Attribution(case.model, METHODS["weighted"], forward)
    for inputs in ((ids, images), (images, ids)):
        found = explain.attribute(inputs, case.y)
        for given, values in zip(inputs, found, strict=True):
            torch.testing.assert_close(values, expected["text" if given is ids else "image"])
    alone = Attribution(case.model, METHODS["weighted"], lambda words: case.model(words, images))
    torch.testing.assert_close(alone.attribute(ids, case.y), expected["text"])
    with pytest.raises(UserError, match="3 inputs, but the model's input streams are"):
        Attribution(case.model, METHODS["weighted"], lambda a, b, c: forward(a, b)).attribute(
            (ids, images, images), case.y
        )
