"""Methods on models in half precision and under autocast: float32 from what was recorded, or an error."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from support import tiny_models
from support.slow import mostly_slow, once_each

from clipmapper.benchmarks import subjects
from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, Attention, record
from clipmapper.relevance import trace as tracing

CPU = torch.device("cpu")
LRP = ("transformer_attribution", "transformer_attribution_libra", "partial_lrp")
# The same numbers by other means: methods that make another forward, or that only draw, are compared apart.
ONE_RECORDING = [
    name for name in METHODS
    if not name.endswith("libra") and name not in (
        *LRP, "random", "beyond_intuition", "attn_lrp", "integrated_gradients", "occlusion", "legrad",
        "value_gradient", "leave_one_out", "weighted_evidence",
    )
]  # fmt: skip


class _Head:
    def __init__(self, read, prefix):
        self.read, self.prefix = read, prefix

    def applies(self, step):
        return step.name.startswith(self.prefix)

    def __call__(self, pooled):
        return self.read(pooled)


def vit(folder, dtype):
    tower = subjects.image_tower("vit", tiny_models.clip_config(folder), 2, CPU).module.double()
    tiny_models.randomise(tower, 0)
    tower, images = tower.to(dtype), tiny_models.images(2).to(dtype)
    return (
        tower,
        lambda rows: tower(images[rows])[:, 2],
        _Head(lambda p: (tower.ln_post(p) @ tower.proj)[:, 2], ""),
    )


def clipmapper(folder, dtype):
    model = tiny_models.clipmapper(folder, image_position_embedding=True).to(dtype).requires_grad_(False)
    images, text = tiny_models.images(2).to(dtype), tiny_models.texts([8, 6])

    def forward(rows):
        return model(images[rows], text[rows], only_class_token=False)[:, 0]

    return model, forward, _Head(lambda pooled: model.head(pooled)[:, 0], "mapper")


MODES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "autocast": (torch.float32, True),
}


RECORDED = [(build, mode) for build in (vit, clipmapper) for mode in MODES]


def name_of(case: tuple | str) -> str:
    return case if isinstance(case, str) else f"{case[0].__name__}-{case[1]}"


@pytest.fixture(scope="module")
def recorded(request, tmp_path_factory):
    """A mode, the trace in it, and the one in float32."""
    build, chosen = request.param
    folder, found = tmp_path_factory.mktemp("half"), []
    for dtype, auto in (MODES[chosen], (torch.float32, False)):
        model, forward, head = build(folder, dtype)
        context = torch.autocast("cpu", torch.bfloat16) if auto else nullcontext()
        with context:  # everything inside, as notebooks do
            with record(model) as trace:
                y = forward(torch.arange(2))
            trace.backward(y)
            trace.again = Again(model, forward, head)
        found.append(trace)
    return chosen, *found


def in_float64(trace):
    def turned(step):
        if not isinstance(step, Attention):
            return step
        numbers = {name: getattr(step, name) for name in tracing._NUMBERS}
        doubles = {name: value.double() for name, value in numbers.items() if value is not None}
        return replace(step, **doubles, rounded=True)

    return replace(trace, steps=[turned(step) for step in trace.steps])


@pytest.mark.parametrize(
    ("name", "recorded"), once_each(product(ONE_RECORDING, RECORDED)), indirect=["recorded"], ids=name_of
)
def test_relevance_of_what_was_recorded_is_exact(recorded, name):
    """The method rounds no more than float32 does (1e-3 of the largest is asked for)."""
    _, trace, _ = recorded
    with torch.autocast("cpu", torch.bfloat16):
        found = METHODS[name](trace).streams
    expected = METHODS[name](in_float64(trace)).streams
    for stream, values in found.items():
        assert values.dtype == torch.float32
        assert (values - expected[stream]).abs().max() <= 1e-4 * expected[stream].abs().max()


# All methods take the same way from half-precise numbers to float32 ones; these few go it in every mode.
IN_EVERY_MODE = ("weighted", "gae", "alti", "token_tm", "grad_cam", *LRP)


SIGNED = ("full_grad", "att_cat", "x_grad_cam", "value_gradient", "value_gradient_plain")
# With LibraGrad the same functions run, on another recording.
CASES = [
    (m, case)
    for m, case in product(METHODS, RECORDED)
    if (case[1] == "autocast" or m in IN_EVERY_MODE) and m != "leave_one_out"  # of tasks' models alone
]
LIBRA = [case for case in CASES if case[0].endswith("_libra")]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [*once_each(case for case in CASES if case not in LIBRA), *mostly_slow(LIBRA, ())],
    indirect=["recorded"],
    ids=name_of,
)  # fmt: skip
def test_every_method_works_in_half_precision_or_says_that_it_does_not(recorded, name):
    """Against the float32 model: what is left is the rounding of the model itself, which these two
    (random, of strong contrast) amplify."""
    mode, trace, exact = recorded
    if name in LRP:
        with pytest.raises(UserError, match="not defined in half precision"):
            METHODS[name](trace)
        return
    # Sums of signed numbers, of which almost all may be below 0 and cut off, are compared before that.
    options = {"sign": "both"} if name.removesuffix("_libra") in SIGNED else {}
    found, expected = METHODS[name](trace, **options).streams, METHODS[name](exact, **options).streams
    for stream, values in found.items():
        assert values.isfinite().all()
        if not expected[stream].any():  # Grad-CAM of this ViT is below 0 and cut off; rounding may lift it
            assert name == "grad_cam"
            continue
        limit = 0.1 if mode == "float16" else 0.6
        assert (values - expected[stream]).abs().max() <= limit * expected[stream].abs().max()


def test_lrp_is_refused_under_autocast(tmp_path):
    model, forward, _ = vit(tmp_path, torch.float32)
    refused = pytest.raises(UserError, match="not defined under autocast")
    with torch.autocast("cpu", torch.bfloat16), refused, record(model, rules="lrp"):
        forward(torch.arange(2))


def test_a_default_of_float64_changes_nothing(tmp_path):
    """(Notebooks of numerical people set it; the model stays in half precision.)"""
    maps = []
    for default in (torch.float32, torch.float64):
        model, forward, _ = vit(tmp_path, torch.float16)
        torch.set_default_dtype(default)
        try:
            with record(model, rules="libra") as trace:
                y = forward(torch.arange(2))
            trace.backward(y)
            names = ("weighted", "gae", "value_gradient_libra", "weighted_evidence_libra", "full_grad_libra")
            maps.append([METHODS[name](trace).streams["image"] for name in names])
        finally:
            torch.set_default_dtype(torch.float32)
    for under_float32, under_float64 in zip(*maps, strict=True):
        torch.testing.assert_close(under_float32, under_float64)
