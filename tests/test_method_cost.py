"""What methods ask of a recording, and how much of the model they run and keep."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from clipmapper.benchmarks.timing import peak_bytes
from clipmapper.relevance import METHODS, Again, Attribution, Relevance, needs_of, record
from clipmapper.relevance.method import Needs

WIDTH, TOKENS, LAYERS = 16, 5, 4


class Model(nn.Module):
    """An encoder of nn.TransformerEncoderLayer over tokens; y is a logit of their first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.head(self.encoder(tokens)[:, 0])


class Readout:
    def __init__(self, model):
        self.model = model

    def applies(self, step):
        return True

    def __call__(self, pooled):
        return self.model.head(pooled)[:, 1]


@pytest.fixture(scope="module")
def model():
    return Model().double().eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(3, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def traced(model, tokens, needs=None):
    needs = Needs() if needs is None else needs
    with record(model, rules=needs.rules) as trace:
        y = model(tokens)[:, 1]
    needs.differentiate(trace, y)
    trace.again = Again(model, lambda rows: model(tokens[rows])[:, 1], Readout(model))
    return trace


@pytest.fixture
def grads(monkeypatch):
    """How many calls of autograd.grad there were."""
    calls, original = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def same(found, expected, **close):
    for stream, values in expected.streams.items():
        assert values.any()
        torch.testing.assert_close(found.streams[stream], values, **close)


def test_what_several_methods_need_together():
    def needs(*names):
        return needs_of([METHODS[name] for name in names])

    assert needs("weighted", "gae") == Needs("plain", True)
    assert needs("weighted_libra", "gae_libra") == Needs("libra", True)
    assert needs("weighted", "gae_libra") == needs("gae_libra", "weighted") == Needs("plain", True)
    assert needs("weighted_libra", "attn_lrp") == Needs("plain", True)
    assert needs("attn_lrp") == Needs("attn_lrp", True)
    assert needs("legrad_libra") == Needs("libra", False)
    assert needs("legrad", "gae") == Needs("plain", True)
    assert needs_of([lambda trace: None]) == Needs()


@pytest.mark.parametrize("name", ["legrad", "legrad_libra"])
@pytest.mark.parametrize("sign", ["positive", "both"])
def test_legrad_in_the_graph_of_the_trace(model, tokens, name, sign):
    expected = METHODS[name](traced(model, tokens), sign=sign)
    needs = METHODS[name].needs
    same(METHODS[name](traced(model, tokens, needs), sign=sign), expected, rtol=1e-12, atol=1e-14)


def test_legrad_makes_a_gradient_a_layer_and_no_forward(model, tokens, grads):
    trace = traced(model, tokens, METHODS["legrad"].needs)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    METHODS["legrad"](trace)
    handle.remove()
    assert len(grads) == LAYERS and not forwards
    assert trace.attention[0].edges  # the caller's graph is kept


@pytest.mark.parametrize("name", ["weighted_libra", "attn_lrp", "legrad_libra"])
def test_a_recording_by_a_methods_own_needs_serves_it_alone(model, tokens, name):
    trace = traced(model, tokens, METHODS[name].needs)
    own = trace.again if name.startswith("legrad") else None
    if own is not None:
        own.undifferentiated = None
    same(METHODS[name](replace(trace, again=own)), METHODS[name](traced(model, tokens)), rtol=1e-10, atol=0)


def test_attribution_records_by_the_methods_rules(model, tokens):
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    found = Attribution(model, METHODS["weighted_libra"]).attribute(tokens, target=1)
    handle.remove()
    assert len(forwards) == 1
    torch.testing.assert_close(found, METHODS["weighted_libra"](traced(model, tokens)).streams["encoder"])


def test_attribution_makes_no_backward_that_the_method_does_not_need(model, tokens, grads):
    def lengths(trace):
        return Relevance({s: torch.ones(trace.batch, length) for s, length in trace.lengths.items()})

    Attribution(model, lengths).attribute(tokens, target=1)
    assert len(grads) == 1
    lengths.needs = Needs(backward=False)
    Attribution(model, lengths).attribute(tokens, target=1)
    assert len(grads) == 1


def test_relevance_of_attention_without_the_rest_of_the_backward(model, tokens):
    """R^A of single sub-layers is what a whole backward under the rules gives."""
    trace = traced(model, tokens)
    whole = trace.again.recorded(trace, "lrp").attention
    for chosen in ([-1], [1, 2]):
        nodes = [trace.attention[i].output_node for i in chosen]
        found = Again(model, trace.again.forward).attention(trace, nodes, "lrp")
        assert set(found) == set(nodes)
        for i, node in zip(chosen, nodes, strict=True):
            assert whole[i].mixed_gradient.any()
            torch.testing.assert_close(
                found[node].mixed_gradient, whole[i].mixed_gradient, rtol=1e-12, atol=0
            )
            assert found[node].before_gradient is None


def test_integrated_gradients_point_by_point(model, tokens):
    """The sum over captum's points, one after the other; no more than a gradient of the batch is held."""
    attr = pytest.importorskip("captum.attr")
    trace = traced(model, tokens)
    sizes = []
    handle = model.encoder.layers[0].register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    found = METHODS["integrated_gradients"](trace, steps=20, sign="both")
    handle.remove()
    assert set(sizes) == {len(tokens)} and len(sizes) <= 20 + 1
    whole = attr.IntegratedGradients(lambda t: model(t)[:, 1]).attribute(tokens, n_steps=20)
    expected = whole.detach().sum(dim=-1)
    torch.testing.assert_close(found.streams["encoder"], expected, rtol=1e-10, atol=1e-12)


def test_occlusion_token_by_token(model, tokens):
    trace = traced(model, tokens)
    sizes = []
    handle = model.encoder.layers[0].register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    found = METHODS["occlusion"](trace, sign="both").streams["encoder"]
    handle.remove()
    assert max(sizes) <= LAYERS * len(tokens) and sum(sizes) <= (TOKENS + 2) * len(tokens)
    assert len(sizes) <= 2 + math.ceil(TOKENS / LAYERS)
    with torch.no_grad():
        y = model(tokens)[:, 1]
        for place in range(TOKENS):
            without = tokens.clone()
            without[:, place] = 0
            torch.testing.assert_close(found[:, place], y - model(without)[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["integrated_gradients", "occlusion"])
def test_memory_is_that_of_two_gradients_at_most(name):
    model = Model().eval()  # whose parameters take a gradient
    tokens = torch.randn(2, 64, WIDTH)

    def floor():
        leaf = tokens.clone().requires_grad_()
        torch.autograd.grad(frozen(leaf)[:, 1].sum(), leaf)

    frozen = Model().eval().requires_grad_(False)
    trace = traced(model, tokens)
    cpu = torch.device("cpu")
    assert peak_bytes(lambda: METHODS[name](trace), cpu) <= 2 * peak_bytes(floor, cpu)


def test_what_only_the_gradients_of_weights_need_is_not_kept():
    tokens, peaks = torch.randn(2, 64, WIDTH), []
    for trained in (True, False):
        trace = traced(Model().eval().requires_grad_(trained), tokens)
        method = partial(METHODS["integrated_gradients"], trace, steps=2)
        peaks.append(peak_bytes(method, torch.device("cpu")))
    assert peaks[0] <= 1.05 * peaks[1]
