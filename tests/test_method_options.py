"""How methods are called: y, sign, start_layer; and what is refused."""

import pytest
import torch
from support import families
from support.own_layers import TOKENS, Doing, Mixed
from support.recordings import maps
from support.slow import mostly_slow
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record
from clipmapper.relevance.methods.lrp import GRADIENT_METHODS

SIGNED = [m.__name__ for m in GRADIENT_METHODS] + ["partial_lrp", "attn_lrp", "occlusion"]


@pytest.fixture(scope="module")
def vit():
    return families.hf_vit()


def recorded(case, rules="plain"):
    with record(case.model, rules=rules) as trace:
        logits = case.model(**case.inputs).logits
    return trace, logits


def again(case, scalar):
    def forward(rows):
        return scalar(case.model(**{k: v[rows] for k, v in case.inputs.items()}).logits)

    class Readout:
        def applies(self, step):
            return True

        def __call__(self, tokens):
            return scalar(case.model.classifier(case.model.vit.layernorm(tokens)))

    return Again(case.model, forward, Readout())


def image(name, trace, *y, **options):
    return METHODS[name](trace, *y, **options).streams["image"]


def explained(case, scalar):
    trace, logits = recorded(case)
    trace.backward(scalar(logits))
    trace.again = again(case, scalar)
    return trace


def test_the_scalar_may_be_given_to_the_method(vit):
    trace, logits = recorded(vit)
    found = [image(name, trace, logits[:, k]) for name in ("weighted", "gae", "rollout") for k in (2, 4, 2)]
    for number, name in enumerate(("weighted", "gae", "rollout")):
        for turn, k in enumerate((2, 4, 2)):
            expected = image(name, explained(vit, lambda out, k=k: out[:, k]))
            assert torch.equal(found[3 * number + turn], expected)
    assert not torch.allclose(found[0], found[1])


def test_the_backward_is_not_made_twice_of_the_same_scalar(vit, monkeypatch):
    trace, logits = recorded(vit)
    y = logits[:, 1]
    trace.backward(y)  # lets go of the graph
    assert torch.equal(image("gae", trace, y), image("gae", trace))
    with pytest.raises(RuntimeError, match=r"the graph is gone: backward\(y, keep_graph=True\)"):
        METHODS["gae"](trace, logits[:, 1])


def test_methods_that_run_the_model_again_do_not_explain_another_scalar(vit):
    trace = explained(vit, lambda out: out[:, 1])
    assert image("occlusion", trace).any()
    trace, logits = recorded(vit)
    trace.again = again(vit, lambda out: out[:, 1])
    with pytest.raises(UserError, match=r"occlusion runs the model more than once: set trace\.again"):
        METHODS["occlusion"](trace, logits[:, 2])


# With LibraGrad the same functions run, on another recording.
QUICK = [name for name in METHODS if not name.endswith("_libra") and name != "beyond_intuition"]


@pytest.mark.parametrize("name", mostly_slow(SIGNED, QUICK))
def test_negative_is_the_method_for_the_opposite_and_both_their_difference(vit, name):
    for_it, against_it = (explained(vit, lambda out, f=f: f * (out[:, 2] - out[:, 0])) for f in (1, -1))
    positive, negative, both = (image(name, for_it, sign=s) for s in ("positive", "negative", "both"))
    assert torch.equal(positive, image(name, for_it))
    if name not in ("attn_lrp", "partial_lrp"):  # LRP of −y is that of y: relevance 1 is passed on
        torch.testing.assert_close(negative, image(name, against_it))
    torch.testing.assert_close(both, positive - negative)
    assert (positive >= 0).all() and (negative >= 0).all() and negative.any()
    assert not torch.allclose(positive, negative)


def test_signs_of_a_hand_worked_row():
    """One head, one sub-layer: ∇A ⊙ A of the read row is (+0.2, −0.3, 0)."""
    from support.made_traces import sublayer

    from clipmapper.relevance import AttentionTrace, Node

    node, zero = Node("t", 0), [[0.0]] * 3
    A = [[0.2, 0.3, 0.5]] * 3
    step = sublayer(node, node, [A], [[[0.2, -0.3, 0.0]] * 3], before=zero, added=zero)
    trace = AttentionTrace([step], {"t": 3}, {}, ("t",), (Node("t", 1), torch.tensor([0])))
    expected = {"positive": [1.2, 0, 0], "negative": [1.0, 0.3, 0], "both": [0.2, -0.3, 0]}
    for sign, row in expected.items():
        found = METHODS["gae"](trace, sign=sign).streams["t"][0]
        torch.testing.assert_close(found, torch.tensor(row, dtype=found.dtype))


def test_any_scalar_function(vit):
    """A regression, a contrast, a difference of two answers' evidence."""
    trace, logits = recorded(vit)
    contrast = image("weighted", trace, logits[:, 2] - logits[:, 0])
    square = image("weighted", trace, (logits - 1).square().mean(dim=1))
    for values in (contrast, square):
        torch.testing.assert_close(values.sum(1), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(contrast, square, atol=1e-3)


def test_what_is_no_scalar_is_refused(vit):
    trace, logits = recorded(vit)
    for wrong in (logits, logits[:1, 0]):
        with pytest.raises(ValueError, match=r"y has shape \(.*\): one number a sample is explained, \[2\]"):
            METHODS["weighted"](trace, wrong)
    with pytest.raises(UserError, match="y='both': the explained scalar must be a tensor"):
        METHODS["input_x_gradient"](trace, "both")


def test_options_that_a_method_does_not_have(vit):
    trace = explained(vit, lambda out: out[:, 1])
    with pytest.raises(UserError, match="rollout has no option sign: it uses no gradient"):
        METHODS["rollout"](trace, sign="negative")
    with pytest.raises(UserError, match="grad_cam has no option start_layer: it does not accumulate"):
        METHODS["grad_cam"](trace, start_layer=1)
    with pytest.raises(UserError, match="gae has no option steps: its options are sign, start_layer"):
        METHODS["gae"](trace, steps=3)
    with pytest.raises(UserError, match="sign='against': must be one of positive, negative, both"):
        METHODS["gae"](trace, sign="against")


LAYERED = [n for n in METHODS if not n.endswith("_libra") and "start_layer" in str(METHODS[n].__signature__)]


def test_the_methods_that_accumulate_have_start_layer():
    assert set(LAYERED) == {
        "weighted", "weighted_token", "weighted_half", "weighted_norm", "weighted_token_norm", "gae",
        "rollout", "attention_flow", "effective_rollout", "effective_weighted", "efficient_rollout",
        "efficient_weighted", "token_tm", "alti", "beyond_intuition", "transformer_attribution", "legrad",
        "full_grad", "att_cat", "x_grad_cam", "value_gradient", "value_gradient_plain",
        "weighted_evidence",
    }  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(LAYERED, QUICK))
def test_start_layer_leaves_out_what_is_before(vit, name):
    """The second of two layers alone: nothing of the first layer's attention matters."""
    trace = explained(vit, lambda out: out[:, 1])
    late = image(name, trace, start_layer=1)
    assert torch.equal(late, image(name, trace, start_layer=-1))
    assert torch.equal(late, image(name, trace, start_layer={"image": 1}))
    assert torch.equal(image(name, trace, start_layer=-2), image(name, trace))
    assert not torch.allclose(late, image(name, trace))
    if name not in ("beyond_intuition", "transformer_attribution", "legrad"):  # these record once more
        first = trace.attention[0]
        first.query, first.mixed_gradient = first.query.flip(2), -first.mixed_gradient
        assert torch.equal(image(name, trace, start_layer=1), late)


def test_start_layers_that_are_not_there(vit):
    trace = explained(vit, lambda out: out[:, 1])
    with pytest.raises(UserError, match=r"start_layer=2: stream 'image' has 2 attention .* be -2 to 1"):
        METHODS["gae"](trace, start_layer=2)
    with pytest.raises(UserError, match="no stream 'text' with sub-layers; one of image"):
        METHODS["gae"](trace, start_layer={"text": 1})


@pytest.mark.slow
def test_tokens_in_another_order_have_the_same_relevance():
    """Attention does not know places: reading place p of rearranged tokens is reading token order[p]."""
    order = [3, 0, 5, 1, 4, 2]
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)]

    def model(between):
        made = Mixed(between)
        made.first, made.second = layers
        return made.eval().double()

    tokens, traces = TOKENS.double(), []
    for between, place in ((nn.Identity(), order[1]), (Doing(lambda x: x[:, order]), 1)):
        whole = model(between)
        with record(whole) as trace:
            y = whole(tokens)[:, place, 3]
        trace.backward(y)
        trace.again = Again(whole, lambda rows, w=whole, p=place: w(tokens[rows])[:, p, 3])
        traces.append(trace)
    assert len(traces[1].steps) == 3
    for name in METHODS:
        # Of the joined stream alone; no function of the model; tokens that this model can't be without.
        if name.startswith("legrad") or name in ("random", "leave_one_out"):
            continue
        expected, found = (METHODS[name](trace).streams["tokens"] for trace in traces)
        torch.testing.assert_close(found, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_relevance_of_words_and_patches_in_one_sequence():
    """LLaVA: words enter beside the projected patches, whose places in the words' stream stay 0."""
    case = families.hf_llava()
    with record(case.model) as trace:
        y = case.y(case.run(case.model, case.inputs))
    trace.backward(y)
    trace.again = Again(
        case.model, lambda rows: case.y(case.run(case.model, {k: v[rows] for k, v in case.inputs.items()}))
    )
    words = case.model.get_input_embeddings()(case.inputs["input_ids"]).detach().requires_grad_()
    out = case.model(inputs_embeds=words, pixel_values=case.inputs["pixel_values"])
    (gradient,) = torch.autograd.grad(case.y(out).sum(), words)
    expected = (words * gradient).sum(-1)
    found = METHODS["input_x_gradient"](trace, sign="both").streams["text"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-8, atol=1e-12)
    occluded = METHODS["occlusion"](trace, sign="both").streams
    assert not occluded["text"][:, 2:11].any() and not found[:, 2:11].any()
    changed = words.detach().clone()
    changed[:, 1] = 0
    out = case.y(case.model(inputs_embeds=changed, pixel_values=case.inputs["pixel_values"])).detach()
    torch.testing.assert_close(occluded["text"][:, 1], y.detach() - out, rtol=0, atol=1e-6)
    assert occluded["image"][:, 1:].any()
    for name in ("alti", "attention_flow", "token_tm"):
        streams = METHODS[name](trace).streams
        assert streams["text"][:, 11:13].any() and not streams["text"][:, 2:11].any()
        assert streams["image"][:, 1:].any()
    assert maps(trace)


def test_tokens_are_replaced_in_the_first_call_of_a_shared_block():
    case = families.shared_block()
    tokens = case.inputs["tokens"]
    with record(case.model) as trace:
        y = case.y(case.model(tokens))
    trace.backward(y)
    trace.again = Again(case.model, lambda rows: case.y(case.model(tokens[rows])))
    changed = tokens.clone()
    changed[:, 4] = 0
    expected = (y - case.y(case.model(changed))).detach()
    found = METHODS["occlusion"](trace, sign="both").streams["tokens"][:, 4]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model, method, message",
    [
        ("hf_gpt2_reading", "input_x_gradient", "stream 'context' is only read, by cross-attention"),
        ("hf_gpt2_reading", "occlusion", "occlusion: the tokens of stream 'context' can't be replaced"),
        ("torch_multihead, batch_first=True", "occlusion", "added to outside of it"),
        ("timm_norm_behind", "alti", r"alti needs the output projection of blocks\.1, which"),
        ("hf_bert", "token_tm", "token_tm is defined for pre-LayerNorm models: bert.encoder.layer.1"),
    ],
)
def test_where_a_method_is_not_defined_it_says_so(model, method, message):
    case = families.CASES[model]()
    with record(case.model) as trace:
        y = case.y(case.run(case.model, case.inputs))
    trace.backward(y)
    trace.again = Again(case.model, lambda rows: case.y(case.run(case.model, case.inputs)))
    with pytest.raises(UserError, match=message):
        METHODS[method](trace)
    if model == "hf_gpt2_reading":
        streams = METHODS["alti"](trace).streams
        assert streams["context"].any() and streams["text"].any()
