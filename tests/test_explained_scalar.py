"""A logit, a probability or a log-probability explained: by every method, however small it is."""

import math

import pytest
import torch
from support import tiny_models, training_models
from support.slow import mostly_slow
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record
from clipmapper.relevance.explained_scalar import EXPLAINED, ClassScalar, Opposite
from clipmapper.tasks.registry import task_named
from clipmapper.tasks.vqa.explain import trace_answers
from clipmapper.tasks.vqa.report import answer_report
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.training.callback import RelevanceCallback
from clipmapper.training.explained import Samples

ANSWERS = [1, 0, 2]
IMAGES, TEXT = tiny_models.images(3), tiny_models.texts((7, 4, 9))
SCALARS = {
    "logit": lambda scores: scores,
    "probability": lambda scores: scores.softmax(dim=1),
    "log_probability": lambda scores: scores.log_softmax(dim=1),
}
# Each way to a gradient: the recorded one, one by other rules, other forwards, other heads, differences.
WAYS = (
    "weighted", "gae", "grad_cam", "grad_eclip", "token_tm", "input_x_gradient", "gae_libra", "attn_lrp",
    "legrad", "beyond_intuition", "integrated_gradients", "occlusion",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.clipmapper(tmp_path_factory.mktemp("clip"))


def plainly(model, explained, sign=1):
    """The trace of the scalar as autograd differentiates it, and a forward that gives it."""
    answers = torch.tensor(ANSWERS)

    def scalar(scores, rows):
        return sign * SCALARS[explained](scores)[torch.arange(len(rows)), answers[rows]]

    def forward(rows):
        return scalar(model(IMAGES[rows], TEXT[rows], only_class_token=False), rows)

    class Head:
        def applies(self, step):
            return step.name.startswith("mapper")

        def __call__(self, pooled):
            return scalar(model.head(pooled), torch.arange(3))

    with record(model) as trace:
        y = forward(torch.arange(3))
    trace.backward(y)
    trace.again = Again(model, forward, Head())
    return trace


# What it is


def test_a_scalar_worked_by_hand():
    """Scores 0 and log 3: p = 1/4, ∇p = p (1 − p) = 3/16, ∇ log p = 1 − p = 3/4."""
    for explained, value, slope in (
        ("logit", 0, 1),
        ("probability", 1 / 4, 3 / 16),
        ("log_probability", math.log(1 / 4), 3 / 4),
    ):
        scores = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
        scalar, row = ClassScalar(torch.tensor([0]), explained), torch.tensor([0])
        y, times = scalar.differentiated(scores, row)
        gradient = torch.autograd.grad(y.sum(), scores)[0] * (1 if times is None else times[:, None])
        assert gradient[0, 0].item() == pytest.approx(slope)
        y = scalar.value(scores, row)
        assert y.item() == pytest.approx(value)
        assert torch.autograd.grad(y.sum(), scores)[0][0, 0].item() == pytest.approx(slope)
        assert Opposite(scalar).value(scores, row).item() == pytest.approx(-value)
        assert scalar.start(scores, row).item() == 0


@pytest.mark.parametrize("explained", mostly_slow(EXPLAINED, ["probability"]))
def test_every_method_explains_it_as_autograd_differentiates_it(model, explained):
    found, plain = (
        trace_answers(model, IMAGES, TEXT, ANSWERS, explained=explained).trace,
        plainly(model, explained),
    )
    for name in WAYS:
        options = {"steps": 3} if name == "integrated_gradients" else {}
        ours, its = (METHODS[name](trace, **options).streams for trace in (found, plain))
        for stream, values in its.items():
            torch.testing.assert_close(ours[stream], values, rtol=1e-8, atol=1e-13, msg=name)


def test_what_speaks_against_it(model):
    """Is what speaks for the opposite, which no option of ours has turned."""
    found = trace_answers(model, IMAGES, TEXT, ANSWERS, explained="probability").trace
    plain = plainly(model, "probability", sign=-1)
    for name in ("gae", "gae_libra", "legrad", "beyond_intuition"):
        ours, values = METHODS[name](found, sign="negative").image, METHODS[name](plain).image
        assert values.any()
        torch.testing.assert_close(ours, values, rtol=1e-8, atol=1e-13, msg=name)


def test_layer_wise_relevance_starts_in_the_logit(model):
    """R^A is the logit's, whatever is explained; ∇A is the explained scalar's."""
    traces = {one: trace_answers(model, IMAGES, TEXT, ANSWERS, explained=one).trace for one in EXPLAINED}
    of_logit = METHODS["partial_lrp"](traces["logit"]).image
    for trace in traces.values():
        assert torch.equal(METHODS["partial_lrp"](trace).image, of_logit)
        own = METHODS["transformer_attribution"](trace).image
        trace.again = traces["logit"].again
        assert torch.equal(METHODS["transformer_attribution"](trace).image, own)
    maps = [METHODS["transformer_attribution"](trace).image for trace in traces.values()]
    assert not torch.allclose(maps[0], maps[1]) and not torch.allclose(maps[1], maps[2])


def test_a_probability_has_the_direction_of_its_logarithm(model):
    """So methods that do not heed the size of y explain both alike, and those linear in it differ by p."""
    p, log_p = (trace_answers(model, IMAGES, TEXT, ANSWERS, explained=one) for one in EXPLAINED[1:])
    for name in ("weighted", "weighted_token"):
        torch.testing.assert_close(METHODS[name](p.trace).image, METHODS[name](log_p.trace).image)
    size = p.logits.softmax(1)[torch.arange(3), ANSWERS][:, None, None]
    for name in ("grad_eclip", "input_x_gradient"):
        torch.testing.assert_close(METHODS[name](p.trace).image, size * METHODS[name](log_p.trace).image)
    of_p, of_log_p = (METHODS["gae"](traced.trace).image for traced in (p, log_p))
    assert not torch.allclose(of_p, size * of_log_p, rtol=1e-2)


# However small


@torch.no_grad()
def improbable(folder, logarithm: float) -> nn.Module:
    """A model that gives answer 1 of the first question this log-probability."""
    model = tiny_models.clipmapper(folder)
    told = model(IMAGES[:1], TEXT[:1])[0].log_softmax(0)[1]
    model.head.layers[-1].bias[1] += logarithm - told + torch.log1p(-told.exp())  # the odds p / (1 − p)
    return model


def first(model, explained="probability"):
    dtype = next(model.parameters()).dtype
    return trace_answers(model, IMAGES[:1].to(dtype), TEXT[:1], [1], explained=explained)


def as_shape(trace, name):
    found = METHODS[name](trace).image.double()
    assert found.isfinite().all() and found.any(), name
    return found / found.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_next_to_nothing_is_explained(tmp_path, dtype):
    """1e-30, in 32 bits and in 16, in which its gradient would be 0."""
    exact = improbable(tmp_path, math.log(1e-30)).to(dtype).double()
    traced = first(exact)
    assert 1e-31 < float(traced.logits[0].softmax(0)[1]) < 1e-29
    rounded = first(improbable(tmp_path, math.log(1e-30)).to(dtype))
    limit = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    for name in ("weighted", "gae", "grad_eclip", "input_x_gradient", "gae_libra"):
        expected = as_shape(traced.trace, name)
        assert (as_shape(rounded.trace, name) - expected).abs().max() < limit, name


def test_less_than_that_is_refused_in_one_line(tmp_path):
    model = improbable(tmp_path, math.log(1e-33)).float()
    with pytest.raises(UserError, match=r"explained=probability: that of 'no' is 1e-33, too small") as error:
        first(model)
    assert "explained=log_probability" in str(error.value) and "\n" not in str(error.value)
    assert as_shape(first(model, "log_probability").trace, "weighted").any()


@pytest.mark.parametrize("name", ["integrated_gradients", "legrad"])
def test_what_float16_would_lose_is_refused(model, tmp_path, name):
    half = tiny_models.clipmapper(tmp_path).half()
    with pytest.raises(UserError, match=r"explained=probability: this method .* float32 or bfloat16"):
        METHODS[name](first(half).trace)
    assert METHODS[name](first(half, "log_probability").trace).image.isfinite().all()


# Where it is asked for


def test_reports_explain_it(tmp_path):
    model = training_models.tiny_model(training_models.tiny_clip(tmp_path)).eval()
    samples = question_samples(model, training_models.small_scenes(), "validation", 2, seed=0)
    for explained in EXPLAINED:
        report = answer_report(model, samples, ("gae",), chunk=2, batch_size=512, seed=0, explained=explained)
        expected = METHODS["gae"](
            trace_answers(model, samples.images, samples.text, explained=explained).trace
        )
        torch.testing.assert_close(torch.from_numpy(report.relevance["gae"].patches), expected.image)


def test_settings_of_tasks():
    vqa, captioning = task_named("vqa"), task_named("captioning")
    nothing = {"explained": None, "word_maps": None}
    assert vqa.report_settings(nothing) == {"explained": "logit"}
    assert captioning.report_settings(nothing | {"explained": "probability"}) == {
        "explained": "probability",
        "word_maps": "scaled",
        "word_weights": "mean",
        "caption_scores": ["log_probability", "mean_probability", "bleu_4", "cider"],
    }
    with pytest.raises(
        UserError, match=r"callbacks.word_maps: this model answers questions; .* are explained$"
    ):
        vqa.report_settings({"word_maps": "raw"}, "callbacks.")


class Seen(Exception):
    """What a report was asked for."""


class NoSamples(Samples):
    ids = others = ()

    def digest(self):
        return ""

    def points(self, methods, scores):
        return 0


def test_the_callback_hands_it_on(monkeypatch, tmp_path):
    numbers = {"every_n_validations": 1, "samples": 1, "pictures": 0, "batch_size": 1, "seed": 0}
    options = {"explained": "probability", "word_maps": "raw"}
    scores = ["removal", "sanity"]
    callback = RelevanceCallback(["gae"], **numbers, confidence=0.9, scores=scores, **options)
    with pytest.raises(UserError, match=r"callbacks\.word_maps"):
        callback.prepare(task_named("vqa"), NoSamples(), tmp_path)
    captioning = task_named("captioning")
    callback.prepare(captioning, NoSamples(), tmp_path)
    options["scores"] = scores

    def report(*args, **given):
        raise Seen({name: given[name] for name in options})

    monkeypatch.setattr(type(captioning), "report", staticmethod(report))
    with pytest.raises(Seen) as seen:
        callback._explain(captioning, nn.Identity(), NoSamples(), None)
    assert seen.value.args == (options,)


@pytest.mark.parametrize("explained", ["odds", "", "Probability"])
def test_another_word_is_one_line(model, explained):
    with pytest.raises(UserError, match=r"must be one of logit, probability, log_probability$"):
        trace_answers(model, IMAGES, TEXT, explained=explained)
