"""The backward rules on every family of models: what y gives arrives at the tokens, or at what is said here.

Under ``lrp`` relevance is 1 at y, under ``libra`` and ``attn_lrp`` it is y. Biases are 0; left out is what
flows into learned queries, and of ``attn_lrp`` what the Taylor rule of a softmax leaves.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import families, more_families
from support.slow import mostly_slow
from torch import nn

from clipmapper.relevance import METHODS, record
from clipmapper.relevance.backward import rules as backward
from clipmapper.relevance.methods.gradients import input_x_gradient

transformers = pytest.importorskip("transformers")

RULES = ("libra", "attn_lrp", "lrp")
CASES = {**families.CASES, **more_families.CASES, "hf_llava": families.hf_llava}
QUICK = ("hf_vit", "hf_arcee", "hf_falcon", "torch_multihead, batch_first=False")
READ_ONLY = ("hf_gpt2_reading",)  # another stream is read that has no sub-layer of its own
EXPERTS = ("hf_mixtral", "hf_qwen2_moe", "hf_qwen3_moe", "hf_olmoe")  # the router's softmax loses some too


def without_biases(case):
    for name, values in [*case.model.named_parameters(), *case.model.named_buffers()]:
        if "bias" in name.split(".")[-1] and values.is_floating_point():
            values.data.zero_()
    if hasattr(case.model, "qformer"):  # the words' positions are added to its queries
        case.model.language_model.model.decoder.embed_positions.weight.data.zero_()
    return case


@contextmanager
def attentions(rules):
    """The inputs and the output of every attention, as they are in the graph; queries vary as well."""
    kept, rule = [], backward._TABLES[rules]["scaled_dot_product_attention"]

    def keeping(func, query, key, value, *args, **kwargs):
        query = query if query.requires_grad else query.detach().requires_grad_()
        inputs = [t.view_as(t) for t in (query, key, value)]
        out = rule(func, *inputs, *args, **kwargs)
        kept.append((*inputs, out.view_as(out)))
        return kept[-1][-1]

    with mock.patch.dict(backward._TABLES[rules], {"scaled_dot_product_attention": keeping}):
        yield kept


def flows(kept, y):
    """Tensor × gradient, summed, of q, k, v and o of each attention."""
    wanted = [t for call in kept for t in call if t.requires_grad]
    found = torch.autograd.grad(y.sum(), wanted, retain_graph=True, allow_unused=True)
    sums = {
        id(t): 0.0 if g is None else float((t * g).detach().sum()) for t, g in zip(wanted, found, strict=True)
    }
    return [[sums.get(id(t), 0.0) for t in call] for call in kept]


@pytest.mark.parametrize("name", mostly_slow([n for n in CASES if n not in READ_ONLY], QUICK))
def test_what_enters_sums_to_y(name):
    case = without_biases(CASES[name]())
    for rules in RULES:
        check_sum(case, name, rules)


def check_sum(case, name, rules):
    with attentions(rules) as kept, record(case.model, rules=rules) as trace:
        y = case.y(case.run(case.model, case.inputs))
    plain = case.y(case.run(case.model, case.inputs))
    torch.testing.assert_close(y.detach(), plain.detach(), rtol=1e-9, atol=1e-9)
    scale = y.detach() if rules == "lrp" else torch.ones_like(y.detach())
    each = flows(kept, y / scale)
    trace.backward(y / scale)
    arrived = sum(float(v.sum()) for v in input_x_gradient(trace, sign="both").streams.values())
    for (q, k, v, o), step in zip(each, trace.attention, strict=True):
        arrived += q if step.pools else 0.0
        arrived += o - q - k - v if rules == "attn_lrp" else 0.0
    expected = float((y.detach() / scale).sum())
    tolerance = 0.2 if name in EXPERTS and rules == "attn_lrp" else 1e-4
    assert arrived == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", mostly_slow(CASES, QUICK))
def test_a_sample_of_a_batch_has_what_it_has_alone(name):
    case = CASES[name]()
    method = METHODS["gae"] if name in READ_ONLY else lambda trace: input_x_gradient(trace, sign="both")

    def streams(inputs, rules):
        with record(case.model, rules=rules) as trace:
            y = case.y(case.run(case.model, inputs))
        trace.backward(y)
        return method(trace).streams

    for rules in RULES:
        together = streams(case.inputs, rules)
        for row in range(2):
            sample = slice(row, row + 1)
            alone = streams(
                {
                    key: value
                    if key == "tgt_mask"
                    else value[:, sample]
                    if case.tokens_first
                    else value[sample]
                    for key, value in case.inputs.items()
                },
                rules,
            )
            for stream, values in alone.items():
                torch.testing.assert_close(together[stream][row], values[0], rtol=1e-5, atol=1e-8)


TOKENS_FIRST = [name for name in CASES if "batch_first=False" in name]


@pytest.mark.parametrize("name", mostly_slow(TOKENS_FIRST, ("torch_multihead, batch_first=False",)))
def test_every_method_with_tokens_first(name):
    """A batch of two against one by one: of every method that is defined there and has no chance in it."""
    from clipmapper.errors import UserError
    from clipmapper.relevance import Again

    case = CASES[name]()

    def trace_of(rows):
        def run(chosen):
            inputs = {
                key: value if key == "tgt_mask" else value[:, [rows[i] for i in chosen.tolist()]]
                for key, value in case.inputs.items()
            }
            return case.y(case.run(case.model, inputs))

        with record(case.model, samples=rows) as trace:
            y = run(torch.arange(len(rows)))
        trace.backward(y)
        trace.again = Again(case.model, run)
        return trace

    traces, defined = [trace_of([0, 1]), trace_of([0]), trace_of([1])], 0
    for method in METHODS.values():
        try:
            together, *alone = (method(trace).streams for trace in traces)
        except UserError:
            continue
        defined += 1
        for row in range(2):
            for stream, values in alone[row].items():
                torch.testing.assert_close(
                    together[stream][row], values[0], rtol=1e-4, atol=1e-7,
                    msg=lambda m, method=method: f"{method.__name__}: {m}",
                )  # fmt: skip
    assert defined > 25


def test_residual_connections_in_place_with_tokens_first():
    class InPlace(families.Plain):
        def forward(self, tokens):
            x = self.embed(tokens)
            for layer in (self.one, self.two):
                mixed = layer(x, x, x, need_weights=False)[0].clone()
                mixed += x
                x = self.norm(mixed)
            return self.head(x[0])[:, 1]

    model, tokens = families.ready(InPlace(batch_first=False)), torch.randn(7, 2, 5, dtype=torch.float64)
    found = []
    for rows in ([0, 1], [0], [1]):
        with record(model, rules="lrp") as trace:
            y = model(tokens[:, rows])
        trace.backward(y)
        found.append(input_x_gradient(trace, sign="both").streams["tokens"])
    torch.testing.assert_close(found[0], torch.cat(found[1:]), rtol=1e-6, atol=1e-9)


def as_linear(model):
    """GPT-2 whose Conv1D modules are written as ``nn.Linear``."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape, dtype=child.weight.dtype)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)
    return model


@pytest.mark.parametrize("rules", RULES)
def test_gpt2_written_with_linear_layers(rules):
    found = []
    for change in (lambda model: model, as_linear):
        case = families.hf_gpt2()
        change(case.model)
        with record(case.model, rules=rules) as trace:
            y = case.y(case.run(case.model, case.inputs))
        trace.backward(y)
        found.append([step.probability_gradient() for step in trace.attention])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["hf_vit", "hf_bert", "hf_gpt2", "hf_llama", "hf_falcon", "open_clip_tower", "shared_block"]
)
def test_plain_residual_blocks_need_no_probing_backward(name):
    case, plain, calls = CASES[name](), torch.autograd.grad, []

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    for rules in ("plain", *RULES):
        with mock.patch("torch.autograd.grad", counted), record(case.model, rules=rules):
            case.run(case.model, case.inputs)
        assert not calls, rules


def test_tanh_of_a_pooler_passes_relevance():
    """Of LXMERT by hand: y = w · tanh(W x); x ∂x = Σ over the units of the relevance that each has."""
    torch.manual_seed(0)
    x, weight, out = torch.randn(4).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    x.requires_grad_()
    with backward.backward_rules("attn_lrp"):
        y = (torch.tanh(F.linear(x[None], weight)) * out).sum()
    hidden = (weight @ x).detach()
    share = out * torch.tanh(hidden) / hidden
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], weight.T @ share)
