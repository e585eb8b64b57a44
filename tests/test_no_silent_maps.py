"""Maps that would be wrong without a word: cut gradients, half precision, checkpointing, overflow."""

import copy
import warnings
from itertools import product

import pytest
import torch
from support import families as base
from support.slow import once_each
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record
from clipmapper.relevance.many_scalars import each_scalar

transformers = pytest.importorskip("transformers")


def vit(layers=3, width=16, **more):
    settings = {**base.IMAGE, "hidden_size": width, "num_hidden_layers": layers, **more}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**settings, num_labels=5))
    return base.ready(model).float()


PIXELS = base.pixels(3).float()


def logit(model, pixels=PIXELS):
    return model(pixels).logits[:, 2]


def explained(model, method, y=logit):
    with record(model) as trace:
        scalar = y(model)
    return METHODS[method](trace, scalar)


class Around(nn.Module):
    """A part of a model, and what is done to its output."""

    def __init__(self, part, change):
        super().__init__()
        self.part, self.change = part, change

    def forward(self, *args, **kwargs):
        return self.change(self.part(*args, **kwargs))


class NoGrad(Around):
    def forward(self, *args, **kwargs):
        with self.change():
            return self.part(*args, **kwargs)


class NoneBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def quantised(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(part), {nn.Linear}, dtype=torch.qint8)[0]


def cut_body(model):
    model.vit.layers = quantised(model.vit.layers)


def cut_mlp(model):
    model.vit.layers[1].mlp = Around(model.vit.layers[1].mlp, lambda x: torch.from_numpy(x.detach().numpy()))


def cut_head(model):
    model.classifier = Around(model.classifier, torch.Tensor.detach)


def cut_blocks(model):
    model.vit.layers[0] = Around(model.vit.layers[0], torch.Tensor.detach)


def cut_function(model):
    model.vit.layers[0] = Around(model.vit.layers[0], NoneBack.apply)


def cut_part(model):
    model.vit.layers[1].attention = NoGrad(model.vit.layers[1].attention, torch.no_grad)


def cut_inference(model):
    model.vit = NoGrad(model.vit, torch.inference_mode)


CUTS = {
    "quantised": (cut_body, r"vit\.layers\.0\.attention\.q_proj: Linear passes no gradient"),
    "one MLP": (cut_mlp, r"vit\.layers\.1\.mlp: Around passes no gradient"),
    "the head": (cut_head, "classifier: Around passes no gradient"),
    "between blocks": (cut_blocks, r"the gradient stops between vit\.layers\.0\S* and vit\.layers\.1"),
    "a function": (cut_function, r"the gradient stops before vit\.layers\.1"),
    "inference mode": (cut_inference, r"the gradient stops between vit\.\S*0 and vit\.\S*1"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_gradient_that_is_cut_inside_the_model_is_named(cut):
    make, message = CUTS[cut]
    model = vit()
    make(model)
    for method in ("weighted", "gae", "grad_cam", "input_x_gradient"):
        with pytest.raises(UserError, match=message) as caught:
            explained(model, method)
        assert "\n" not in str(caught.value) and "inside the recorder" not in str(caught.value)
    with record(model) as trace:
        logit(model)
    trace.read = (trace.attention[-1].output_node, torch.zeros(3, dtype=torch.long))
    values = METHODS["rollout"](trace).streams["image"]
    assert trace.inputs == ("image",) and bool((values > 0).all())
    trace.again = Again(model, lambda rows: logit(model, PIXELS[rows]))
    with pytest.raises(UserError, match=message):
        METHODS["integrated_gradients"](trace)


def test_a_y_of_another_forward_is_the_users_mistake():
    other = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="run the model inside the recorder"):
        explained(vit(), "weighted", lambda model: (logit(model), other(torch.ones(2)))[1])
    with pytest.raises(ValueError, match="run the model inside the recorder"):
        explained(vit(), "weighted", lambda model: logit(model).detach())


def test_what_does_not_reach_y_is_no_cut():
    """An auxiliary head that trains nothing, and tokens that y does not read."""

    class WithGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aside = vit(), nn.Linear(16, 3)

        def forward(self, pixels):
            states = self.body(pixels, output_hidden_states=True)
            self.aside(states.hidden_states[-1].detach())
            return states

    model = WithGate()
    expected = explained(model.body, "weighted").streams["image"]
    torch.testing.assert_close(explained(model, "weighted").streams["image"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "autocast"), once_each(product([torch.float16, torch.bfloat16], [False, True]))
)
def test_half_precision_holds_gradients_of_any_size(dtype, autocast):
    """y of 1e-8 to 1e4, a softmax probability of 1e-4 and less, and samples that differ by 1e8."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**base.IMAGE, "hidden_size": 32, "num_hidden_layers": 4}, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    halved = model if autocast else copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(halved).float()
    rare = torch.tensor([0, 0, -9.0, 0, 0])
    scalars = {
        **{f"{s:g}": (lambda x, s=s: x[:, 2] * s) for s in (1e-8, 1e-6, 1e-3, 1.0, 1e4)},
        "probability": lambda x: (x.float() + rare).softmax(dim=-1)[:, 2],
        "apart": lambda x: x[:, 2].float() * torch.tensor([1.0, 1e-4, 1e-8]),
    }
    for name, scalar in scalars.items():
        pixels = PIXELS.to(halved.dtype)
        with torch.autocast("cpu", dtype, enabled=autocast), record(halved) as trace:
            y = scalar(halved(pixels).logits)
        trace.backward(y)
        with record(exact) as reference:
            expected_y = scalar(exact(pixels.float()).logits)
        reference.backward(expected_y)
        for method in ("weighted", "weighted_token", "gae"):
            found, expected = (METHODS[method](t).image.flatten(1) for t in (trace, reference))
            expected = expected.float()
            off = (found - expected).abs().amax(dim=1) / expected.amax(dim=1)
            # (Where y is large, gae multiplies the layers: the rounding of the gradients of all of them. Of
            # bfloat16 processors differ.)
            limit = 0.01 if dtype == torch.float16 else 0.03 if method == "gae" else 0.02
            assert bool((off < limit).all()), (name, method, off)


def test_half_precision_rescues_the_words_of_a_caption_too():
    model = base.hf_gpt2().model.float()
    tokens = base.ids(1, 7)

    def maps(model, factor):
        with record(model) as trace:
            y = model(tokens).logits[0, 2:5, 9].float() * factor
        position = torch.tensor([2, 3, 4])
        (rows,) = each_scalar(trace, y, position, [0, 1, 2])
        return {name: METHODS[name](rows).text.float() for name in ("weighted", "input_x_gradient")}

    half = copy.deepcopy(model).half()
    expected, found = maps(half.float(), 1e-7), maps(copy.deepcopy(model).half(), 1e-7)
    for name, values in expected.items():
        torch.testing.assert_close(found[name] / values.max(), values / values.max(), rtol=0, atol=0.02)


def checkpointed_vit(reentrant):
    model = vit()
    for number, block in enumerate(model.vit.layers):
        run = block.forward
        block.forward = lambda x, *a, run=run, **k: checkpoint(run, x, *a, use_reentrant=reentrant)
        assert number < 3
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_off_while_recording(reentrant):
    expected = explained(vit(), "weighted").streams["image"]
    found = explained(checkpointed_vit(reentrant), "weighted").streams["image"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_checkpointing_of_timm():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=5
    ).eval()
    run = lambda m: m(PIXELS)[:, 2]  # noqa: E731
    expected = explained(model, "weighted", run).streams["image"]
    model.set_grad_checkpointing()
    torch.testing.assert_close(explained(model, "weighted", run).streams["image"], expected, rtol=0, atol=0)
    assert model.grad_checkpointing
    # And it works again behind the recorder.
    x = PIXELS.clone().requires_grad_()
    model(x)[:, 2].sum().backward()
    assert bool(x.grad.any())


def test_a_map_that_is_not_finite_names_the_sub_layer():
    pixels = PIXELS.clone()
    pixels[1, 0, 0, 0] = torch.nan
    for method in ("weighted", "rollout", "gae", "input_x_gradient"):
        with pytest.raises(UserError, match=rf"{method}: the map of sample 1 is not finite.*vit\.layers\.0"):
            explained(vit(), method, lambda model: logit(model, pixels))
    model = vit()
    with torch.no_grad():
        model.vit.layers[2].mlp.fc2.weight[0, 0] = torch.inf
        model.vit.layers[1].attention.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"vit\.layers\.1 \((value|mixed)\)"):
        explained(model, "weighted")


@pytest.mark.parametrize("method", ["weighted", "gae", "input_x_gradient"])
def test_a_y_without_a_gradient_is_no_map_of_zeros(method):
    with pytest.raises(UserError, match="a gradient of 0 at every token"):
        explained(vit(), method, lambda model: logit(model) * 0)


def test_two_forwards_are_not_one_map():
    """Which of the two images is meant can't be known: the first one's map would be 0 here."""
    model = vit()
    with record(model) as trace:
        logit(model)
        y = logit(model, PIXELS.flip(0))
    relevance = METHODS["weighted"](trace, y)
    with pytest.raises(ValueError, match="2 image streams were recorded"):
        _ = relevance.image
    alone = explained(vit(), "weighted", lambda model: logit(model, PIXELS.flip(0))).streams["image"]
    torch.testing.assert_close(relevance.streams["image 2"], alone, rtol=0, atol=0)


WITHOUT_GRADIENT = (
    "weighted_half", "rollout", "raw_attention", "random", "attention_flow", "effective_attention",
    "effective_rollout", "efficient_attention", "efficient_rollout", "alti", "occlusion",
    "leave_one_out",
)  # fmt: skip


def test_every_method_of_a_quantised_model_gives_a_map_or_names_the_module():
    model = vit()
    cut_body(model)
    run = Again(model, lambda rows: logit(model, PIXELS[rows]))
    for name, method in METHODS.items():
        with record(model) as trace:
            y = logit(model)
        trace.again = run
        if name not in WITHOUT_GRADIENT:
            for given in ((), (y,)):  # the backward that can't be made is not asked for
                with pytest.raises(UserError, match=r"q_proj: Linear passes no gradient"):
                    method(trace, *given)
        else:
            trace.read = (trace.attention[-1].output_node, torch.zeros(3, dtype=torch.long))
            try:
                assert bool(method(trace).streams["image"].any())
            except UserError as error:
                why = {
                    "alti": "its weights can't be read",
                    "leave_one_out": "nobody said how from this model's",
                }
                assert why[name] in str(error)
